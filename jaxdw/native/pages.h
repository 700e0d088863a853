// Pages of 2 MiB for memory that is new.
#ifndef JAXDW_NATIVE_PAGES_H_
#define JAXDW_NATIVE_PAGES_H_

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace jaxdw {

#if defined(__linux__)
struct Range {
  uintptr_t first = 0, end = 0;  // both 0 where it is not known
};

// What Linux 6.11 and newer answer for an address: struct procmap_query of linux/fs.h.
struct MappingQuery {
  uint64_t size, query_flags, address, first, end, flags, page_size, offset, inode;
  uint32_t device[2], name_size, build_id_size;
  uint64_t name, build_id;
};
static_assert(sizeof(MappingQuery) == 104, "not the layout of struct procmap_query");

// The mapping that holds `address`, if it is memory of this process alone that can be written and has no name: neither
// that of a file nor "[heap]".
inline Range mapping_of(uintptr_t address) {
  static const pid_t opener = getpid();
  static const int file = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
  if (file < 0 || getpid() != opener) return {};  // in a forked child the file still tells of the parent
  char name[16];  // an error for longer ones
  MappingQuery query = {};
  query.size = sizeof query, query.address = address;
  query.name = reinterpret_cast<uintptr_t>(name), query.name_size = sizeof name;
  if (ioctl(file, _IOWR('f', 17, MappingQuery), &query) != 0 || query.name_size != 0) return {};
  constexpr uint64_t writable = 2, executable = 4, shared = 8;
  if ((query.flags & (writable | executable | shared)) != writable) return {};
  return {static_cast<uintptr_t>(query.first), static_cast<uintptr_t>(query.end)};
}
#endif

// Asks the system for pages of 2 MiB where memory has none yet. XLA takes large results, and the memory of a whole
// program, from the system anew in each call. The system then zeroes a page of 4 KiB whenever one is first written,
// which takes longer than to compute what is in it.
//
// A result lies among those of XLA's own operations. So it asks for the whole mapping, if that is at most 64 times the
// result. Linux joins neighbours in one mapping, so other new memory may be among it. Where nothing is known of the
// mapping, the first and the last page may hold other memory, too.
inline void ask_for_large_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t page = uintptr_t{1} << 21, least = uintptr_t{1} << 19, most = 64;
  if (bytes < least) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  Range range{begin & ~(page - 1), (begin + bytes + page - 1) & ~(page - 1)};
  const Range mapping = mapping_of(begin);
  if (mapping.end >= begin + bytes && (mapping.end - mapping.first) / most <= bytes) range = mapping;
  madvise(reinterpret_cast<void*>(range.first), range.end - range.first, MADV_HUGEPAGE);
#endif
}

}  // namespace jaxdw

#endif  // JAXDW_NATIVE_PAGES_H_
