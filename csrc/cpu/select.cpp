#include "select.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <numeric>
#include <vector>

#define RENDSEG_KERNELS "select_kernels.h"
#include "compile_kernels.h"

namespace rendseg {
namespace {

constexpr int64_t kBlock = 64;            // keys looked at together where most blocks hold nothing
constexpr int64_t kSegment = 1024;        // and where most hold something
constexpr int64_t kChunk = 256 * kBlock;  // unit of work, fixed so that the result does not depend on the thread count
constexpr int64_t kGrain = 4 * kChunk;    // fewest keys worth a thread

// Where the k-th smallest falls: its bin, how many keys lie in the bins before, and how many in it.
struct Cut {
  uint32_t bin;
  int64_t below;
  int64_t inside;
};

Cut find_cut(const uint32_t* histogram, int bins, int64_t k) {
  int64_t below = 0;
  for (int bin = 0; bin < bins; ++bin) {
    const int64_t inside = histogram[bin];
    if (below + inside >= k) return {static_cast<uint32_t>(bin), below, inside};
    below += inside;
  }
  TORCH_INTERNAL_ASSERT(false, "the histogram holds ", below, " keys, fewer than the ", k, " wanted");
}

// A digit of the key, counted only among the keys whose higher digits equal `prefix`.
struct Digit {
  int shift;
  int bins;
  int prefix_shift;
  uint32_t prefix;
};

// Counts into `histogram[bins]`. Two interleaved tables break the dependency between equal neighbours (flat maps); keys
// of another prefix fall into a spare bin, so there is no branch to mispredict.
void count_digit(const uint32_t* keys, int64_t size, const Digit& digit, uint32_t* histogram) {
  const int bins = digit.bins;
  const uint32_t mask = static_cast<uint32_t>(bins - 1);
  uint32_t table[2][kHistogramBins + 1] = {};
  const auto bin_of = [&](uint32_t key) {
    const uint32_t same = 0u - static_cast<uint32_t>(key >> digit.prefix_shift == digit.prefix);
    return ((key >> digit.shift) & mask & same) | (static_cast<uint32_t>(bins) & ~same);
  };
  int64_t i = 0;
  for (; i + 1 < size; i += 2) {
    ++table[0][bin_of(keys[i])];
    ++table[1][bin_of(keys[i + 1])];
  }
  if (i < size) ++table[0][bin_of(keys[i])];
  for (int bin = 0; bin < bins; ++bin) histogram[bin] += table[0][bin] + table[1][bin];
}

void count_digit_threaded(const uint32_t* keys, int64_t size, const Digit& digit, uint32_t* histogram) {
  std::mutex mutex;  // counts are integers, so the order of the additions does not matter
  at::parallel_for(0, size, kGrain, [&](int64_t begin, int64_t end) {
    uint32_t local[kHistogramBins] = {};
    count_digit(keys + begin, end - begin, digit, local);
    const std::lock_guard<std::mutex> lock(mutex);
    for (int bin = 0; bin < digit.bins; ++bin) histogram[bin] += local[bin];
  });
}

// The exact threshold: every key below `key` is selected, and the first `ties` of those equal to it.
struct Threshold {
  uint32_t key;
  int64_t ties;
};

template <typename Count>
Threshold refine_threshold(const Cut& first, int64_t k, const Count& count) {
  uint32_t histogram[kHistogramBins] = {};
  count(Digit{9, kHistogramBins, kHistogramShift, first.bin}, histogram);
  k -= first.below;
  const Cut second = find_cut(histogram, kHistogramBins, k);
  k -= second.below;
  const uint32_t prefix = (first.bin << 11) | second.bin;
  std::memset(histogram, 0, sizeof(histogram));
  count(Digit{0, 512, 9, prefix}, histogram);
  const Cut third = find_cut(histogram, 512, k);
  const uint32_t key = (prefix << 9) | third.bin;
  if (third.inside == k - third.below) return {key + 1, 0};  // all ties
  return {key, k - third.below};
}

// Whether any of kBlock keys is <= bound; keys are below 2^31, so signed comparison is right and vectorises everywhere.
inline bool any_at_most(const uint32_t* keys, int32_t bound) {
  int32_t any = 0;
  for (int64_t j = 0; j < kBlock; ++j) any |= static_cast<int32_t>(static_cast<int32_t>(keys[j]) <= bound);
  return any != 0;
}

// Keys and indices of one chunk that may still be selected, in index order.
struct Candidates {
  std::vector<uint32_t> keys;
  std::vector<uint32_t> indices;
};

void collect(const uint32_t* keys, int64_t begin, int64_t end, uint32_t bound, Candidates& out) {
  const auto offsets_of = RENDSEG_PICK(offsets_at_most);
  size_t count = 0;
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t length = std::min(kBlock, end - block);
    if (length == kBlock && !any_at_most(keys + block, static_cast<int32_t>(bound))) continue;
    if (out.keys.size() < count + kBlock) {
      const size_t capacity = std::max<size_t>(2 * out.keys.size(), count + 4 * kBlock);
      out.keys.resize(capacity);
      out.indices.resize(capacity);
    }
    uint32_t offsets[kBlock + kSelectRoom];
    const int64_t found = offsets_of(keys + block, length, bound, offsets);
    for (int64_t i = 0; i < found; ++i) {
      out.keys[count] = keys[block + offsets[i]];
      out.indices[count++] = static_cast<uint32_t>(block) + offsets[i];
    }
  }
  out.keys.resize(count);
  out.indices.resize(count);
}

// Writes the selected of keys[begin, end): all below the threshold and the first `ties` equal to it. Returns how many.
template <typename IndexOf>
int64_t emit(const uint32_t* keys, int64_t begin, int64_t end, Threshold threshold, const IndexOf& index_of,
             int64_t* indices) {
  const auto offsets_of = RENDSEG_PICK(offsets_at_most);
  int64_t written = 0;
  for (int64_t segment = begin; segment < end; segment += kSegment) {
    const uint32_t* at = keys + segment;
    const int64_t length = std::min(kSegment, end - segment);
    const bool closed = threshold.ties == 0;  // no more ties are wanted: below the threshold only
    if (closed && threshold.key == 0) break;
    const int64_t ties = closed ? 0 : std::count(at, at + length, threshold.key);
    uint32_t offsets[kSegment + kSelectRoom];
    int64_t count = 0;
    if (ties <= threshold.ties) {
      count = offsets_of(at, length, closed ? threshold.key - 1 : threshold.key, offsets);
      threshold.ties -= ties;
    } else {
      for (int64_t i = 0; i < length; ++i) {
        const bool tie = at[i] == threshold.key && threshold.ties > 0;
        threshold.ties -= tie;
        offsets[count] = static_cast<uint32_t>(i);
        count += static_cast<int64_t>(tie || at[i] < threshold.key);
      }
    }
    for (int64_t i = 0; i < count; ++i) indices[written + i] = index_of(segment + offsets[i]);
    written += count;
  }
  return written;
}

// The usual case: few keys lie at or below the threshold bin, so one pass gathers them and the rest works on those.
void select_from_candidates(const uint32_t* keys, int64_t size, int64_t k, int64_t* indices, const Cut& first) {
  const uint32_t bound = ((first.bin + 1) << kHistogramShift) - 1;
  const int64_t chunks = (size + kChunk - 1) / kChunk;
  std::vector<Candidates> found(static_cast<size_t>(chunks));
  at::parallel_for(0, chunks, kGrain / kChunk, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      collect(keys, c * kChunk, std::min(size, (c + 1) * kChunk), bound, found[static_cast<size_t>(c)]);
    }
  });
  Candidates& all = found[0];
  const size_t count = static_cast<size_t>(first.below + first.inside);
  all.keys.reserve(count);
  all.indices.reserve(count);
  for (size_t c = 1; c < found.size(); ++c) {
    all.keys.insert(all.keys.end(), found[c].keys.begin(), found[c].keys.end());
    all.indices.insert(all.indices.end(), found[c].indices.begin(), found[c].indices.end());
  }
  const uint32_t* candidates = all.indices.data();
  const int64_t total = static_cast<int64_t>(all.keys.size());
  if (total == k) {
    std::copy(candidates, candidates + total, indices);
    return;
  }
  const Threshold threshold = refine_threshold(first, k, [&](const Digit& digit, uint32_t* histogram) {
    count_digit(all.keys.data(), total, digit, histogram);
  });
  const int64_t written = emit(
      all.keys.data(), 0, total, threshold, [&](int64_t i) { return static_cast<int64_t>(candidates[i]); }, indices);
  TORCH_INTERNAL_ASSERT(written == k);
}

// The keys of one bin.
std::vector<uint32_t> inside_of(const uint32_t* keys, int64_t size, const Cut& cut) {
  const auto keys_of = RENDSEG_PICK(keys_of_bin);
  std::vector<uint32_t> inside(static_cast<size_t>(cut.inside));
  std::mutex mutex;  // only their counts matter, not their order
  int64_t count = 0;
  at::parallel_for(0, size, kGrain, [&](int64_t begin, int64_t end) {
    uint32_t part[kSegment + kSelectRoom];
    for (int64_t first = begin; first < end; first += kSegment) {
      const int64_t found = keys_of(keys + first, std::min(kSegment, end - first), cut.bin, part);
      const std::lock_guard<std::mutex> lock(mutex);
      TORCH_INTERNAL_ASSERT(count + found <= cut.inside);
      std::copy(part, part + found, inside.begin() + count);
      count += found;
    }
  });
  inside.resize(static_cast<size_t>(count));
  return inside;
}

// Many keys lie there (many ties, large k): every pass reads the map.
void select_from_map(const uint32_t* keys, int64_t size, int64_t k, int64_t* indices, const Cut& first) {
  const bool few = first.inside <= size / 8;  // else flat maps
  const std::vector<uint32_t> inside = few ? inside_of(keys, size, first) : std::vector<uint32_t>();
  const Threshold threshold = refine_threshold(first, k, [&](const Digit& digit, uint32_t* histogram) {
    count_digit_threaded(few ? inside.data() : keys, few ? static_cast<int64_t>(inside.size()) : size, digit,
                         histogram);
  });
  if (size <= kGrain) {
    const int64_t written = emit(keys, 0, size, threshold, [](int64_t i) { return i; }, indices);
    TORCH_INTERNAL_ASSERT(written == k);
    return;
  }
  const int64_t chunks = (size + kChunk - 1) / kChunk;
  std::vector<int64_t> below(static_cast<size_t>(chunks));
  std::vector<int64_t> equal(static_cast<size_t>(chunks));
  at::parallel_for(0, chunks, kGrain / kChunk, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const int64_t stop = std::min(size, (c + 1) * kChunk);
      int32_t less = 0;
      int32_t same = 0;
      for (int64_t i = c * kChunk; i < stop; ++i) {
        less += static_cast<int32_t>(keys[i]) < static_cast<int32_t>(threshold.key);
        same += keys[i] == threshold.key;
      }
      below[static_cast<size_t>(c)] = less;
      equal[static_cast<size_t>(c)] = same;
    }
  });
  std::vector<int64_t> start(static_cast<size_t>(chunks) + 1);
  int64_t ties = threshold.ties;
  for (size_t c = 0; c < static_cast<size_t>(chunks); ++c) {
    equal[c] = std::min(equal[c], ties);
    ties -= equal[c];
    start[c + 1] = start[c] + below[c] + equal[c];
  }
  TORCH_INTERNAL_ASSERT(start.back() == k);
  at::parallel_for(0, chunks, kGrain / kChunk, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const size_t chunk = static_cast<size_t>(c);
      if (start[chunk + 1] == start[chunk]) continue;
      emit(
          keys, c * kChunk, std::min(size, (c + 1) * kChunk), Threshold{threshold.key, equal[chunk]},
          [](int64_t i) { return i; }, indices + start[chunk]);
    }
  });
}

}  // namespace

void add_histogram(const uint32_t* keys, int64_t size, uint32_t* histogram) {
  count_digit_threaded(keys, size, Digit{kHistogramShift, kHistogramBins, 31, 0}, histogram);
}

void select_smallest(const uint32_t* keys, int64_t size, int64_t k, int64_t* indices, const uint32_t* histogram) {
  TORCH_CHECK_VALUE(size < (int64_t{1} << 32), "selection holds at most 2^32 - 1 cells in an image, got ", size);
  TORCH_INTERNAL_ASSERT(0 <= k && k <= size);
  if (k == 0) return;
  if (k == size) {
    std::iota(indices, indices + k, int64_t{0});
    return;
  }
  const Cut first = find_cut(histogram, kHistogramBins, k);
  if (first.below + first.inside <= size / 8) {
    select_from_candidates(keys, size, k, indices, first);
  } else {
    select_from_map(keys, size, k, indices, first);
  }
}

void select_smallest(const uint32_t* keys, int64_t size, int64_t k, int64_t* indices) {
  uint32_t histogram[kHistogramBins] = {};
  if (0 < k && k < size) add_histogram(keys, size, histogram);
  select_smallest(keys, size, k, indices, histogram);
}

void cell_centres(const int64_t* indices, int64_t count, int64_t height, int64_t width, float* xy) {
  const float columns = static_cast<float>(width);
  const float rows = static_cast<float>(height);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = indices[i] / width;
    const int64_t col = indices[i] - row * width;
    xy[2 * i] = (static_cast<float>(col) + 0.5f) / columns;
    xy[2 * i + 1] = (static_cast<float>(row) + 0.5f) / rows;
  }
}

}  // namespace rendseg
