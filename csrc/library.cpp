// Every operator schema of rendseg, one page. rendseg/ops/schemas.py holds the same words for the case where this
// library is absent; a test compares the two.
#include <torch/library.h>

TORCH_LIBRARY(rendseg, m) {
  // uncertain_points
  m.def("uncertainty(Tensor logits, Tensor? class_index=None) -> Tensor");
  m.def("uncertain_points(Tensor logits, int num_points, Tensor? class_index=None) -> (Tensor, Tensor)");
  m.def(
      "sample_uncertain_points(Tensor logits, int num_points, float oversample_ratio=3.0, float importance_ratio=0.75, *, "
      "Tensor? class_index=None, Tensor? image_index=None, str padding_mode=\"zeros\", bool align_corners=False, "
      "Generator? generator=None, Tensor? random_coords=None) -> Tensor",
      {at::Tag::nondeterministic_seeded});
  // subdivide
  m.def(
      "subdivide(Tensor logits, int num_points, int scale_factor=2, bool align_corners=False, Tensor? class_index=None, "
      "bool return_logits=True) -> (Tensor, Tensor, Tensor)");
  m.def(
      "_subdivide_labels(Tensor logits, int num_points, int scale_factor=2, bool align_corners=False) -> "
      "(Tensor, Tensor, Tensor)");
  m.def("_subdivide_backward(Tensor grad, SymInt height, SymInt width, bool align_corners) -> Tensor");
  // point_sample
  m.def(
      "point_sample(Tensor[] input, Tensor coords, str mode=\"bilinear\", str padding_mode=\"zeros\", "
      "bool align_corners=False) -> Tensor");
  m.def(
      "_point_sample_backward(Tensor grad, Tensor[] input, Tensor coords, str mode, str padding_mode, bool align_corners, "
      "bool input_grad, bool coords_grad) -> Tensor[]");
  m.def("point_labels(Tensor labels, Tensor coords, int ignore_index=255) -> Tensor");
  // mask_losses
  m.def(
      "mask_losses(Tensor logits, Tensor[] targets, Tensor coords, Tensor image_index, Tensor query_index, "
      "Tensor target_index, *, str label_mode=\"bilinear\", str padding_mode=\"zeros\", SymInt[]? canvas=None) -> "
      "(Tensor, Tensor)");
  m.def(
      "_mask_losses_backward(Tensor cross_entropy_grad, Tensor dice_grad, Tensor logits, Tensor[] targets, "
      "Tensor coords, Tensor image_index, Tensor query_index, Tensor target_index, str label_mode, str padding_mode, "
      "SymInt[]? canvas) -> Tensor");
  m.def(
      "mask_costs(Tensor logits, Tensor[] targets, Tensor coords, *, str label_mode=\"bilinear\", "
      "str padding_mode=\"zeros\", SymInt[]? canvas=None) -> (Tensor, Tensor)");
  // scatter_points
  m.def("scatter_points(Tensor logits, Tensor indices, Tensor values) -> Tensor");
  m.def("scatter_points_(Tensor(a!) logits, Tensor indices, Tensor values) -> ()");
  m.def("_scatter_points_backward(Tensor grad, Tensor indices) -> (Tensor, Tensor)");
  // encode
  m.def("scaled_l2(Tensor x, Tensor codewords, Tensor scale) -> Tensor");
  m.def("_scaled_l2_backward(Tensor grad, Tensor x, Tensor codewords, Tensor scale) -> (Tensor, Tensor, Tensor)");
  m.def("aggregate(Tensor assignment, Tensor x, Tensor codewords) -> Tensor");
  m.def("_aggregate_backward(Tensor grad, Tensor assignment, Tensor x, Tensor codewords) -> (Tensor, Tensor, Tensor)");
  m.def("encode(Tensor x, Tensor codewords, Tensor scale) -> Tensor");
  m.def("_encode_backward(Tensor grad, Tensor x, Tensor codewords, Tensor scale) -> (Tensor, Tensor, Tensor)");
  // refine
  m.def(
      "_refine_mlp(Tensor coarse, Tensor[] features, Tensor[] weights, Tensor[] biases, int steps, int num_points, "
      "str coarse_source, int scale_factor, bool align_corners, str padding_mode, bool coarse_each_layer, "
      "bool coarse_first, bool labels, Tensor? class_index=None, bool class_only=False, Tensor? image_index=None, "
      "Tensor? boxes=None) -> Tensor");
}
