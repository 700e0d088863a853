// Runs problems that it reads from its input, to test the kernels under an emulator of another processor.
//
// A problem is 27 numbers of 64 bits (type, whether there is a bias, whether it comes last, and the geometry as
// jaxdw/native/plain.cc has it), then x, kernel, bias and dy. The output is y and the gradient by the kernel.
#include <cstdint>
#include <cstdio>
#include <vector>

extern "C" int jaxdw_conv(const char*, int64_t, int, const int64_t*, const void*, const void*, const void*, int,
                          const void*, const void*, const void*, int, void*);
extern "C" int jaxdw_kernel_gradient(const char*, int64_t, int, const int64_t*, const void*, const void*, void*);

int main(int, char** arguments) {
  int64_t numbers[27];
  while (std::fread(numbers, sizeof numbers, 1, stdin) == 1) {
    const int64_t sizes[] = {4, 8, 2, 2}, size = sizes[numbers[0]];
    const int64_t* geometry = numbers + 3;
    auto count = [&](int from) { return geometry[from] * geometry[from + 1] * geometry[from + 2] * geometry[1]; };
    auto read = [&](int64_t elements) {
      std::vector<char> bytes(elements * size);
      if (std::fread(bytes.data(), 1, bytes.size(), stdin) != bytes.size()) std::fputs("too short\n", stderr);
      return bytes;
    };
    std::vector<char> x = read(geometry[0] * count(2)), kernel = read(count(5)), bias = read(geometry[1] * numbers[1]),
                      dy = read(geometry[0] * count(8)), y(dy.size()), gradient(kernel.size());
    int failure = jaxdw_conv(arguments[1], 1, int(numbers[0]), geometry, x.data(), kernel.data(),
                             numbers[1] ? bias.data() : nullptr, int(numbers[2]), nullptr, nullptr, nullptr, 0, y.data());
    failure |= jaxdw_kernel_gradient(arguments[1], 2, int(numbers[0]), geometry, x.data(), dy.data(), gradient.data());
    if (failure) return failure;
    std::fwrite(y.data(), 1, y.size(), stdout);
    std::fwrite(gradient.data(), 1, gradient.size(), stdout);
  }
}
