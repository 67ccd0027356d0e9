// The machine behind cuda_on_cpu.h: fibers, their scheduler, shared memory.
#include "../../csrc/cuda/device.cuh"

#include <sys/mman.h>

#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

// --- switching stacks

#if defined(__x86_64__)
// Saves the registers that a call must keep on the stack in use, leaves its address at *from, goes on with `to`.
// swapcontext would do the same with two system calls.
extern "C" void rendseg_switch_stack(void** from, void* to);
asm(R"(
.text
.type rendseg_switch_stack, @function
.hidden rendseg_switch_stack
.globl rendseg_switch_stack
rendseg_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size rendseg_switch_stack, .-rendseg_switch_stack
)");
#endif

namespace emulation {
namespace {

constexpr std::size_t kStackBytes = 256 * 1024;

struct Context {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  void* fake_stack = nullptr;  // AddressSanitizer's
};

void fiber_main();

struct Fiber {
  Context context;
  unsigned char* stack = nullptr;
  enum State { kReady, kWaiting, kDone } state = kDone;
  const char* waits_for = "";
  Place place;
  struct Copy {
    unsigned char* to;
    std::vector<unsigned char> bytes;
  };
  std::deque<std::vector<Copy>> groups;  // committed asynchronous copies, the oldest first
  std::vector<Copy> open;

  Fiber() {
    // Pages are only touched when used; the lowest one is a guard.
    void* memory =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, 4096, PROT_NONE);
    stack = static_cast<unsigned char*>(memory);
  }
  ~Fiber() { munmap(stack, kStackBytes); }
  Fiber(const Fiber&) = delete;

  void start() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack + 4096, kStackBytes - 4096);
#endif
    state = kReady;
    groups.clear();
    open.clear();
    context.fake_stack = nullptr;
#if defined(__x86_64__)
    // As if fiber_main had been called: six registers, then the address to return to, and a stack aligned for a call.
    void** top = reinterpret_cast<void**>(stack + kStackBytes - 64);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&fiber_main);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    context.stack_pointer = top;
#else
    getcontext(&context.context);
    context.context.uc_stack.ss_sp = stack + 4096;
    context.context.uc_stack.ss_size = kStackBytes - 4096;
    context.context.uc_link = nullptr;
    makecontext(&context.context, fiber_main, 0);
#endif
  }
};

void switch_context(Context& from, Context& to) {
#if defined(__x86_64__)
  rendseg_switch_stack(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
}

// --- the block that runs

// Lanes of one warp on their way through one shuffle, vote or warp barrier.
struct Exchange {
  unsigned mask, arrived;
  const char* name;
  Place place;
  unsigned char data[32 * kLaneBytes];
};

struct SharedBlock {
  std::unique_ptr<unsigned char[]> memory;  // an allocation of its own, so that AddressSanitizer sees its end
  unsigned char* data;
  std::size_t bytes;
};

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<int> ready;
  int threads = 0, current = -1;
  Context scheduler;
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_stack_bytes = 0;
  const std::function<void()>* kernel = nullptr;
  std::mt19937_64 random;
  std::string failure;
  std::map<const void*, SharedBlock> shared;
  SharedBlock dynamic{};
  std::size_t static_bytes = 0;
  unsigned char poison = 0xff;
  // The block barrier.
  int arrived = 0;
  int64_t sum = 0, result = 0;
  const char* barrier = "";
  Place barrier_place;
  std::vector<std::vector<std::shared_ptr<Exchange>>> exchanges;  // per warp, those under way
};

Machine machine;
uint64_t seed = 0, launch_count = 0;

std::string where(const Place& place) {
  const std::string file = place.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(place.line());
}

bool same_place(const Place& a, const Place& b) {
  return a.line() == b.line() && (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

// Leaves the running fiber; returns when the scheduler takes it up again.
void leave() {
  Fiber& fiber = *machine.fibers[machine.current];
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fiber.state == Fiber::kDone ? nullptr : &fiber.context.fake_stack,
                                 machine.scheduler_stack, machine.scheduler_stack_bytes);
#endif
  switch_context(fiber.context, machine.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.context.fake_stack, nullptr, nullptr);
#endif
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_stack_bytes);
#endif
  try {
    (*machine.kernel)();
  } catch (const std::exception& error) {
    machine.failure = error.what();
  }
  machine.fibers[machine.current]->state = Fiber::kDone;
  leave();
  std::abort();  // a finished fiber is not resumed
}

void resume(int thread) {
  Fiber& fiber = *machine.fibers[thread];
  machine.current = thread;
  threadIdx = {static_cast<unsigned>(thread), 0, 0};
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine.scheduler.fake_stack, fiber.stack, kStackBytes);
#endif
  switch_context(machine.scheduler, fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine.scheduler.fake_stack, nullptr, nullptr);
#endif
  machine.current = -1;
}

void make_ready(int thread) {
  machine.fibers[thread]->state = Fiber::kReady;
  machine.ready.push_back(thread);
}

void wait(const char* name, const Place& place) {
  Fiber& fiber = *machine.fibers[machine.current];
  fiber.state = Fiber::kWaiting;
  fiber.waits_for = name;
  fiber.place = place;
  leave();
}

SharedBlock garbage(std::size_t bytes, std::size_t alignment) {
  SharedBlock block;
  block.memory.reset(new unsigned char[bytes + alignment]);
  const auto address = reinterpret_cast<uintptr_t>(block.memory.get());
  // Against the upper end, which is the one that loops run over.
  block.data = reinterpret_cast<unsigned char*>((address + alignment) / alignment * alignment);
  block.bytes = bytes;
  std::memset(block.data, machine.poison, bytes);
#if defined(__SANITIZE_ADDRESS__)
  const std::size_t spare = alignment - (block.data - block.memory.get());
  if (spare > 0) __asan_poison_memory_region(block.data + bytes, spare);
#endif
  return block;
}

void release(SharedBlock& block) {
#if defined(__SANITIZE_ADDRESS__)
  if (block.memory) __asan_unpoison_memory_region(block.data, block.bytes);
#endif
  block.memory.reset();
}

// Every thread that is not done, grouped by what it waits for.
std::string deadlock() {
  std::map<std::string, int> waiting;
  int done = 0;
  for (int t = 0; t < machine.threads; ++t) {
    const Fiber& fiber = *machine.fibers[t];
    if (fiber.state == Fiber::kDone) {
      ++done;
    } else {
      ++waiting[fiber.waits_for + (" at " + where(fiber.place))];
    }
  }
  std::string text = "deadlock in block " + std::to_string(blockIdx.x) + ": ";
  for (const auto& [what, count] : waiting) text += std::to_string(count) + " threads wait in " + what + ", ";
  return text + std::to_string(done) + " have returned";
}

void run_block(int64_t shared_bytes) {
  // Never a plausible number: NaN, huge or denormal, as the seed will have it.
  constexpr unsigned char kPoison[] = {0xff, 0x7f, 0xfe, 0xa5};
  machine.poison = kPoison[machine.random() % 4];
  machine.static_bytes = 0;
  machine.arrived = 0;
  machine.sum = 0;
  for (auto& [key, block] : machine.shared) release(block);
  machine.shared.clear();
  machine.dynamic = garbage(static_cast<std::size_t>(shared_bytes), 128);
  machine.exchanges.assign((machine.threads + 31) / 32, {});
  machine.ready.clear();
  for (int t = 0; t < machine.threads; ++t) {
    machine.fibers[t]->start();
    machine.ready.push_back(t);
  }
  int done = 0;
  while (!machine.ready.empty()) {
    const std::size_t pick = machine.random() % machine.ready.size();
    const int thread = machine.ready[pick];
    machine.ready[pick] = machine.ready.back();
    machine.ready.pop_back();
    resume(thread);
    if (!machine.failure.empty()) break;
    done += machine.fibers[thread]->state == Fiber::kDone;
  }
  if (machine.failure.empty() && done < machine.threads) machine.failure = deadlock();
  release(machine.dynamic);
}

}  // namespace

void set_seed(uint64_t value) { seed = value; }
uint64_t launches() { return launch_count; }
int lane() { return static_cast<int>(threadIdx.x) % 32; }

Settings& settings() {
  static Settings value;
  return value;
}

void* static_shared(const void* key, std::size_t bytes, std::size_t alignment) {
  auto found = machine.shared.find(key);
  if (found == machine.shared.end()) {
    machine.static_bytes += bytes;
    if (machine.static_bytes > 48 * 1024) fail("more than 48 KB of static shared memory");
    if (machine.static_bytes + machine.dynamic.bytes > static_cast<std::size_t>(settings().shared_limit)) {
      fail("more shared memory than a block may have");
    }
    found = machine.shared.emplace(key, garbage(bytes, std::max<std::size_t>(alignment, 16))).first;
  }
  return found->second.data;
}

unsigned char* dynamic_shared() { return machine.dynamic.data; }

void fail(const char* text, Place place) {
  machine.failure = std::string(text) + " (thread " + std::to_string(threadIdx.x) + " of block " +
                    std::to_string(blockIdx.x) + ", " + where(place) + ")";
  machine.fibers[machine.current]->state = Fiber::kWaiting;
  leave();
  std::abort();  // the scheduler gives the block up
}

int64_t block_barrier(int64_t value, const char* name, Place place) {
  if (machine.arrived == 0) {
    machine.barrier = name;
    machine.barrier_place = place;
    machine.sum = 0;
  } else if (!same_place(machine.barrier_place, place)) {
    const std::string text = "threads of one block meet in different barriers: " + std::string(machine.barrier) +
                             " at " + where(machine.barrier_place) + " and " + name;
    fail(text.c_str(), place);
  }
  machine.sum += value;
  if (++machine.arrived == machine.threads) {
    machine.arrived = 0;
    machine.result = machine.sum;
    for (int t = 0; t < machine.threads; ++t) {
      if (t != machine.current) make_ready(t);
    }
    make_ready(machine.current);
    leave();
  } else {
    wait(name, place);
  }
  return machine.result;  // the next barrier cannot be complete before everyone has read this
}

void warp_exchange(unsigned mask, const char* name, const void* mine, int bytes, unsigned char* out, Place place) {
  const int lane_index = lane(), warp = static_cast<int>(threadIdx.x) / 32;
  if (!(mask >> lane_index & 1)) fail("the lane is not in the mask of its own shuffle, vote or __syncwarp", place);
  const int lanes = std::min(32, machine.threads - warp * 32);
  if (lanes < 32 && mask >> lanes != 0) mask &= (1u << lanes) - 1;
  auto& under_way = machine.exchanges[warp];
  std::shared_ptr<Exchange> exchange;
  for (const auto& other : under_way) {
    if ((other->mask & mask) == 0) continue;
    if (other->mask != mask || std::strcmp(other->name, name) != 0 || !same_place(other->place, place)) {
      const std::string text = "lanes of one warp meet in different operations: " + std::string(other->name) + " at " +
                               where(other->place) + " and " + name + " at " + where(place);
      fail(text.c_str(), place);
    }
    exchange = other;
  }
  if (!exchange) {
    exchange.reset(new Exchange);
    exchange->mask = mask;
    exchange->arrived = 0;
    exchange->name = name;
    exchange->place = place;
    under_way.push_back(exchange);
  }
  if (bytes > 0) std::memcpy(exchange->data + lane_index * bytes, mine, static_cast<std::size_t>(bytes));
  exchange->arrived |= 1u << lane_index;
  if (exchange->arrived == mask) {
    under_way.erase(std::find(under_way.begin(), under_way.end(), exchange));
    for (int l = 0; l < lanes; ++l) {
      if (mask >> l & 1 && l != lane_index) make_ready(warp * 32 + l);
    }
    make_ready(machine.current);
    leave();
  } else {
    wait(name, place);
  }
  if (bytes > 0) std::memcpy(out, exchange->data, static_cast<std::size_t>(32 * bytes));
}

void maybe_switch() {
  if (machine.random() % 4 != 0) return;
  make_ready(machine.current);
  leave();
}

void copy_async(void* shared, const void* global, int bytes, bool valid) {
  std::vector<unsigned char> value(static_cast<std::size_t>(bytes), 0);
  if (valid) std::memcpy(value.data(), global, value.size());
  machine.fibers[machine.current]->open.push_back({static_cast<unsigned char*>(shared), std::move(value)});
}

void copy_async_commit() {
  Fiber& fiber = *machine.fibers[machine.current];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

void copy_async_wait(int pending) {
  Fiber& fiber = *machine.fibers[machine.current];
  while (static_cast<int>(fiber.groups.size()) > pending) {
    for (const Fiber::Copy& copy : fiber.groups.front()) std::memcpy(copy.to, copy.bytes.data(), copy.bytes.size());
    fiber.groups.pop_front();
  }
}

void run(int64_t blocks, int threads, int64_t shared_bytes, const std::function<void()>& kernel) {
  ++launch_count;
  if (blocks < 1 || blocks > INT32_MAX) throw std::runtime_error("a grid of " + std::to_string(blocks) + " blocks");
  if (threads < 1 || threads > 1024) throw std::runtime_error(std::to_string(threads) + " threads in a block");
  if (shared_bytes < 0 || shared_bytes > settings().shared_limit) {
    throw std::runtime_error(std::to_string(shared_bytes) + " bytes of shared memory for a block, the limit is " +
                             std::to_string(settings().shared_limit));
  }
  while (static_cast<int>(machine.fibers.size()) < threads) machine.fibers.push_back(std::make_unique<Fiber>());
  machine.threads = threads;
  machine.kernel = &kernel;
  machine.failure.clear();
  machine.random.seed(seed * 0x9e3779b97f4a7c15ull + launch_count);
  gridDim = {static_cast<unsigned>(blocks), 1, 1};
  blockDim = {static_cast<unsigned>(threads), 1, 1};
  std::vector<unsigned> order(static_cast<std::size_t>(blocks));
  for (std::size_t b = 0; b < order.size(); ++b) order[b] = static_cast<unsigned>(b);
  std::shuffle(order.begin(), order.end(), machine.random);
  for (const unsigned block : order) {
    blockIdx = {block, 0, 0};
    run_block(shared_bytes);
    if (!machine.failure.empty()) throw std::runtime_error("emulation: " + machine.failure);
  }
}

}  // namespace emulation

// --- half

float __half2float(rendseg::half_t x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 0x1fu, mantissa = x.bits & 0x3ffu;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
  if (exponent == 0) {
    const float value = std::ldexp(static_cast<float>(mantissa), -24);
    return sign ? -value : value;
  }
  return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

rendseg::half_t __float2half_rn(float x) {
  const uint32_t bits = __float_as_uint(x), magnitude = bits & 0x7fffffffu;
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  if (magnitude > 0x7f800000u) return {0x7fff};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and more
  if (magnitude < 0x38800000u) {  // below the smallest normal number: in units of 2^-24, halves to even
    const float scaled = std::nearbyint(std::ldexp(__uint_as_float(magnitude), 24));
    return {static_cast<uint16_t>(sign | static_cast<uint16_t>(scaled))};
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}

// For the tests, through ctypes.
extern "C" {
void rendseg_emulation_seed(uint64_t value) { emulation::set_seed(value); }
uint64_t rendseg_emulation_launches() { return emulation::launches(); }
void rendseg_emulation_settings(int processors, int64_t shared_limit) {
  emulation::settings() = {processors, shared_limit};
}
}
