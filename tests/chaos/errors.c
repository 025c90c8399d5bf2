/* Lets calls of one process on files of a run fail, as those of a file server do.

LD_PRELOAD loads it into every process of a campaign. A file `$FEDLLM_CHAOS_WIRES/errors.PID` with
"ERRNO COUNT" makes the next COUNT calls of that process on paths below $FEDLLM_CHAOS_RUN fail; every one
adds a byte to `errors.PID.told`. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* Say whether a call on a path fails now; errno is set then. */
static int fails(const char *path) {
  const char *run = getenv("FEDLLM_CHAOS_RUN"), *wires = getenv("FEDLLM_CHAOS_WIRES");
  char flag[4096], told[4096], said[32] = "";
  struct stat now;
  int file, number = 0, count = 0, before = errno;
  if (!run || !wires || !path || strncmp(path, run, strlen(run))) return 0;
  snprintf(flag, sizeof flag, "%s/errors.%d", wires, (int)getpid());
  file = syscall(SYS_openat, AT_FDCWD, flag, O_RDONLY | O_CLOEXEC, 0);
  if (file < 0) { errno = before; return 0; }
  if (syscall(SYS_read, file, said, sizeof said - 1) > 0) sscanf(said, "%d %d", &number, &count);
  syscall(SYS_close, file);
  snprintf(told, sizeof told, "%s.told", flag);
  file = syscall(SYS_openat, AT_FDCWD, told, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  if (file < 0) { errno = before; return 0; }
  count = syscall(SYS_fstat, file, &now) || now.st_size >= count ? 0 : syscall(SYS_write, file, ".", 1) == 1;
  syscall(SYS_close, file);
  errno = count ? number : before;
  return count;
}

#define MODE(flags, last) \
  mode_t mode = 0; \
  if ((flags) & (O_CREAT | __O_TMPFILE)) { va_list rest; va_start(rest, last); mode = va_arg(rest, int); va_end(rest); }
#define OPEN(name) \
  int name(const char *path, int flags, ...) { MODE(flags, flags) return fails(path) ? -1 : REAL(name)(path, flags, mode); }
#define OPENAT(name) \
  int name(int folder, const char *path, int flags, ...) { MODE(flags, flags) return fails(path) ? -1 : REAL(name)(folder, path, flags, mode); }
#define STAT(name, kind) int name(const char *path, struct kind *found) { return fails(path) ? -1 : REAL(name)(path, found); }
#define STATAT(name, kind) \
  int name(int folder, const char *path, struct kind *found, int flags) { return fails(path) ? -1 : REAL(name)(folder, path, found, flags); }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
STAT(stat, stat)
STAT(stat64, stat64)
STAT(lstat, stat)
STAT(lstat64, stat64)
STATAT(fstatat, stat)
STATAT(fstatat64, stat64)
int rename(const char *from, const char *to) { return fails(to) ? -1 : REAL(rename)(from, to); }
int renameat(int a, const char *from, int b, const char *to) { return fails(to) ? -1 : REAL(renameat)(a, from, b, to); }
int link(const char *from, const char *to) { return fails(to) ? -1 : REAL(link)(from, to); }
int linkat(int a, const char *from, int b, const char *to, int flags) { return fails(to) ? -1 : REAL(linkat)(a, from, b, to, flags); }
int unlink(const char *path) { return fails(path) ? -1 : REAL(unlink)(path); }
int mkdir(const char *path, mode_t mode) { return fails(path) ? -1 : REAL(mkdir)(path, mode); }
DIR *opendir(const char *path) { return fails(path) ? NULL : REAL(opendir)(path); }
