// Segments an image without Python: runs a package that `rendseg export --format aoti` wrote.
//
//   rendseg_segment PACKAGE IMAGE.ppm LABELS.pgm
//
// IMAGE is a binary PPM (P6) of 8-bit RGB; LABELS becomes a PGM (P5) of the class of every pixel, 16-bit beyond 256
// classes. The package says which size it takes, whether it normalises, and with which mean and deviation; an image
// smaller than a fixed size, or of a size that is no multiple of what a free one must be, is padded right and below
// with the mean colour, and the answer cropped. Ends with 1 and one line on stderr when something does not fit.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iostream>
#include <limits>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "cpu/isa.h"

namespace {

using Metadata = std::unordered_map<std::string, std::string>;

const std::string& entry(const Metadata& metadata, const std::string& key) {
  const auto found = metadata.find(key);
  if (found == metadata.end()) throw std::runtime_error("the package was not written by rendseg export: no " + key);
  return found->second;
}

// A JSON list of numbers, or a single one.
std::vector<double> numbers(const std::string& text) {
  std::vector<double> values;
  for (const char* rest = text.c_str(); *rest != '\0';) {
    char* end = nullptr;
    const double value = std::strtod(rest, &end);
    if (end == rest) {
      ++rest;
    } else {
      values.push_back(value);
      rest = end;
    }
  }
  return values;
}

struct Image {
  int64_t height = 0, width = 0;
  std::vector<uint8_t> pixels;  // [height, width, 3]
};

int64_t header_number(std::istream& file) {
  while (std::isspace(file.peek()) || file.peek() == '#') {
    if (file.get() == '#') file.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
  }
  int64_t value = 0;
  if (!(file >> value) || value < 1 || value > 65535) throw std::runtime_error("its header is damaged");
  return value;
}

Image read_ppm(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot open " + path);
  try {
    if (file.get() != 'P' || file.get() != '6') throw std::runtime_error("it is no binary PPM (P6)");
    Image image;
    image.width = header_number(file);
    image.height = header_number(file);
    if (header_number(file) != 255) throw std::runtime_error("it is not of 8 bits (maximum 255)");
    file.get();  // the one white-space character before the pixels
    image.pixels.resize(static_cast<size_t>(image.height * image.width * 3));
    file.read(reinterpret_cast<char*>(image.pixels.data()), static_cast<std::streamsize>(image.pixels.size()));
    if (static_cast<size_t>(file.gcount()) != image.pixels.size()) throw std::runtime_error("it is truncated");
    return image;
  } catch (const std::exception& error) {
    throw std::runtime_error(path + " cannot be read: " + error.what());
  }
}

// Height and width of the tensor for this image.
std::array<int64_t, 2> padded_size(const Metadata& metadata, const Image& image) {
  const std::vector<double> size = numbers(entry(metadata, "size")), step = numbers(entry(metadata, "step"));
  const bool free = entry(metadata, "dynamic_size") == "true";
  const std::array<int64_t, 2> have = {image.height, image.width};
  std::array<int64_t, 2> result{};
  for (size_t i = 0; i < 2; ++i) {
    const int64_t multiple = static_cast<int64_t>(step.at(0));
    result[i] =
        free ? std::max<int64_t>(2, (have[i] + multiple - 1) / multiple) * multiple : static_cast<int64_t>(size.at(i));
    if (have[i] > result[i]) {
      throw std::runtime_error("the image is " + std::to_string(have[0]) + " x " + std::to_string(have[1]) +
                               ", the package takes height and width " + entry(metadata, "size") +
                               ": scale the image, or export with --size or --dynamic-size");
    }
  }
  return result;
}

at::Tensor to_input(const Metadata& metadata, const Image& image) {
  const auto [height, width] = padded_size(metadata, image);
  const std::vector<double> mean = numbers(entry(metadata, "mean")), deviation = numbers(entry(metadata, "std"));
  const bool bytes = entry(metadata, "preprocessing") == "true";
  const bool turned = !bytes && entry(metadata, "channel_order") == "\"bgr\"";
  const int64_t images = static_cast<int64_t>(numbers(entry(metadata, "batch")).at(0));
  if (entry(metadata, "dynamic_batch") != "true" && images != 1) {
    throw std::runtime_error("the package takes batches of " + std::to_string(images) + ": export with --batch 1");
  }
  // Every value is written: inside the image from its pixels, outside the mean colour.
  at::Tensor input = bytes ? at::empty({1, height, width, 3}, at::kByte) : at::empty({1, 3, height, width}, at::kFloat);
  for (int64_t c = 0; c < 3; ++c) {
    const auto m = static_cast<float>(mean.at(c)), d = static_cast<float>(deviation.at(c));
    const float scale = 1 / (255 * d), shift = -m / d;
    const auto colour = static_cast<uint8_t>(std::lround(255 * m));
    for (int64_t y = 0; y < height; ++y) {
      for (int64_t x = 0; x < width; ++x) {
        const bool inside = y < image.height && x < image.width;
        const uint8_t value =
            inside ? image.pixels[static_cast<size_t>((y * image.width + x) * 3 + (turned ? 2 - c : c))] : colour;
        if (bytes) {
          input.mutable_data_ptr<uint8_t>()[(y * width + x) * 3 + c] = value;
        } else {
          input.mutable_data_ptr<float>()[(c * height + y) * width + x] =
              inside ? shift + static_cast<float>(value) * scale : 0.0f;
        }
      }
    }
  }
  return input;
}

void write_pgm(const std::string& path, const at::Tensor& labels /*[1,H,W]*/, const Image& image) {
  const bool wide = labels.scalar_type() != at::kByte;
  const at::Tensor values = labels.to(at::kInt).cpu().contiguous();
  const int32_t* cells = values.const_data_ptr<int32_t>();
  std::ofstream file(path, std::ios::binary);
  file << "P5\n" << image.width << " " << image.height << "\n" << (wide ? 65535 : 255) << "\n";
  for (int64_t y = 0; y < image.height; ++y) {
    for (int64_t x = 0; x < image.width; ++x) {
      const int32_t label = cells[y * values.size(2) + x];
      if (wide) file.put(static_cast<char>(label >> 8));
      file.put(static_cast<char>(label & 255));
    }
  }
  file.close();
  if (!file) throw std::runtime_error("cannot write " + path);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) {
    std::cerr << "usage: rendseg_segment PACKAGE IMAGE.ppm LABELS.pgm\n";
    return 2;
  }
  try {
    const std::string path = arguments[1];
    if (!std::ifstream(path)) throw std::runtime_error("cannot open " + path);
    const Image image = read_ppm(arguments[2]);
    // Naming a function of librendseg_ops makes the linker keep it; loading it registers the operators of the package.
    std::printf("rendseg CPU kernels use: %s\n", rendseg::isa_name(rendseg::isa()));
    torch::inductor::AOTIModelPackageLoader package(path);
    const Metadata metadata = package.get_metadata();
    at::Tensor input = to_input(metadata, image);
    const auto device = metadata.find("AOTI_DEVICE_KEY");
    if (device != metadata.end() && device->second != "cpu") input = input.to(at::Device(device->second));
    at::Tensor labels = package.run({input}).at(0);
    const auto classes = std::count(entry(metadata, "palette").begin(), entry(metadata, "palette").end(), '[') - 1;
    if (entry(metadata, "output") == "logits") labels = labels.argmax(1).to(classes <= 256 ? at::kByte : at::kShort);
    write_pgm(arguments[3], labels, image);
    std::printf("%lld x %lld pixels, %lld classes -> %s\n", static_cast<long long>(image.height),
                static_cast<long long>(image.width), static_cast<long long>(classes), arguments[3]);
    return 0;
  } catch (const std::exception& error) {
    std::string what = error.what();
    std::cerr << "rendseg_segment: " << what.substr(0, what.find('\n')) << "\n";
    return 1;
  }
}
