/* Faults at single calls of the C library that touch files below one folder.
 *
 * Calls are intercepted in a process that is already running: `faults_install` puts functions of
 * this file into the tables through which every loaded library (Python, safetensors, tokenizers,
 * Arrow) calls the C library, as a preloaded library would at its start. Rust renames without the C
 * library, so renames are caught where they enter the kernel (seccomp, SIGSYS). What else goes
 * another way is not seen; the journal is therefore compared with the folder (see faults.py).
 *
 * While it is armed, each call below the watched folder has a number. The call with the number
 * `at` kills the process or fails, once or with all that follow; or the folder is gone from then on
 * (it has another name). What was done is written to a journal, a
 * line for each change, and the content of each file that is synced is copied, so that what a
 * power cut would leave can be made from it. Nothing is really synced.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <link.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <ucontext.h>
#include <unistd.h>

#ifndef RENAME_EXCHANGE
#define RENAME_EXCHANGE 2 /* of linux/fs.h */
#endif
#define OURS 0x0FA17 /* any number that no argument is */
enum { COUNT, KILL, FAIL, FAIL_ON, GONE };
enum { READS = 1, WRITES = 2, TAKES_SPACE = 4 };

static char watched[PATH_MAX], store[PATH_MAX];
static long calls, fails_at;
static int armed, what, error_number, exchanges, journal = -1, full_file = -1;
static __thread int inside;

/* Whether a path is the watched folder or below it. */
static int below(const char *path) {
  size_t n = strlen(watched);
  return !strncmp(path, watched, n) && (path[n] == '/' || !path[n]);
}

/* The absolute path of a name in a folder, and of an open file. */
static int path_of(int folder, const char *name, char *out) {
  char own[64];
  ssize_t n = 0;
  if (name && name[0] == '/') return snprintf(out, PATH_MAX, "%s", name) < PATH_MAX;
  if (folder == AT_FDCWD) {
    if (!getcwd(out, PATH_MAX)) return 0;
    n = (ssize_t)strlen(out);
  } else {
    snprintf(own, sizeof own, "/proc/self/fd/%d", folder);
    if ((n = readlink(own, out, PATH_MAX - 1)) < 0) return 0;
    out[n] = 0;
  }
  if (name && name[0]) return snprintf(out + n, (size_t)(PATH_MAX - n), "/%s", name) < PATH_MAX - n;
  return 1;
}

static void note(const char *op, const char *one, const char *other) {
  char line[2 * PATH_MAX + 64];
  if (journal < 0) return;
  int n = snprintf(line, sizeof line, "%ld\t%s\t%s\t%s\n", calls, op, one, other);
  if (write(journal, line, (size_t)n) != n) _exit(98);
}

static int rename_now(int from, const char *one, int to, const char *other, unsigned flags);

/* Give a call its number; whether it is to fail. */
static int fails(int kind) {
  calls++;
  if (what == COUNT || calls < fails_at || (calls > fails_at && what != FAIL_ON)) return 0;
  if (what == KILL) _exit(99);
  if (what == GONE) {
    char gone[PATH_MAX + 8];
    snprintf(gone, sizeof gone, "%s.gone", watched);
    rename_now(AT_FDCWD, watched, AT_FDCWD, gone, 0);
    note("failed", "", "");
    return 0;
  }
  int of_space = error_number == ENOSPC || error_number == EDQUOT;
  if (kind == READS && error_number != EIO) return 0;
  if (of_space && !(kind & TAKES_SPACE)) return 0;
  note("failed", "", "");
  errno = error_number;
  return 1;
}

static void copy_synced(int file) {
  char name[PATH_MAX + 64], buffer[1 << 14];
  snprintf(name, sizeof name, "%s/%ld", store, calls);
  int out = open(name, O_WRONLY | O_CREAT | O_TRUNC, 0600);
  off_t at = 0;
  ssize_t n;
  char own[64];
  snprintf(own, sizeof own, "/proc/self/fd/%d", file);
  int in = open(own, O_RDONLY); /* the file itself may be open for writing alone */
  while (in >= 0 && (n = pread(in, buffer, sizeof buffer, at)) > 0) {
    if (write(out, buffer, (size_t)n) != n) _exit(98);
    at += n;
  }
  close(in);
  close(out);
}

#define OUTSIDE(folder, name) \
  (!armed || inside || !path_of((folder), (name), path) || !below(path))

static int opened(int folder, const char *name, int flags, mode_t mode) {
  char path[PATH_MAX];
  struct stat before;
  if (OUTSIDE(folder, name)) return openat(folder, name, flags, mode);
  int writes = (flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC);
  int is_new = flags & O_CREAT && fstatat(folder, name, &before, AT_SYMLINK_NOFOLLOW) < 0;
  int unnamed = (flags & O_TMPFILE) == O_TMPFILE;
  if (fails(is_new || unnamed ? WRITES | TAKES_SPACE : writes ? WRITES : READS)) return -1;
  int file = openat(folder, name, flags, mode);
  if (file >= 0 && is_new && !unnamed) note("create", path, "");
  else if (file >= 0 && flags & O_TRUNC) note("write", path, "");
  return file;
}

#define MODE(flags) \
  mode_t mode = 0; \
  if ((flags) & (O_CREAT | O_TMPFILE)) { \
    va_list more; \
    va_start(more, flags); \
    mode = va_arg(more, mode_t); \
    va_end(more); \
  }

static int my_open(const char *name, int flags, ...) {
  MODE(flags)
  return opened(AT_FDCWD, name, flags, mode);
}
static int my_openat(int folder, const char *name, int flags, ...) {
  MODE(flags)
  return opened(folder, name, flags, mode);
}
static int my_creat(const char *name, mode_t mode) {
  return opened(AT_FDCWD, name, O_CREAT | O_WRONLY | O_TRUNC, mode);
}

/* Before a write: -1 to fail, else how many bytes of `size` may be written. */
static ssize_t room(int file, size_t size) {
  char path[PATH_MAX];
  if (OUTSIDE(file, NULL)) return (ssize_t)size;
  if (file == full_file) { /* the disk took the first half of the last write */
    calls++;
    full_file = -1;
    note("failed", "", "");
    errno = error_number;
    return -1;
  }
  if (calls + 1 == fails_at && what != COUNT && size > 1) {
    int of_space = error_number == ENOSPC || error_number == EDQUOT;
    if (what == KILL || of_space) {
      calls++;
      note("write", path, "");
      full_file = what == KILL ? -1 : file;
      return (ssize_t)size / 2;
    }
  }
  if (fails(WRITES | TAKES_SPACE)) return -1;
  note("write", path, "");
  return (ssize_t)size;
}

static ssize_t written(ssize_t done) {
  if (armed && !inside && what == KILL && calls == fails_at) _exit(99); /* a half of it is there */
  return done;
}

static ssize_t my_write(int file, const void *from, size_t size) {
  ssize_t n = room(file, size);
  return n < 0 ? -1 : written(write(file, from, (size_t)n));
}
static ssize_t my_pwrite(int file, const void *from, size_t size, off_t at) {
  ssize_t n = room(file, size);
  return n < 0 ? -1 : written(pwrite(file, from, (size_t)n, at));
}
static ssize_t my_writev(int file, const struct iovec *from, int num) {
  return room(file, 1) < 0 ? -1 : written(writev(file, from, num));
}
static ssize_t my_sendfile(int out, int in, off_t *at, size_t size) {
  return room(out, 1) < 0 ? -1 : written(sendfile(out, in, at, size));
}
static ssize_t my_copy_file_range(int in, off_t *from, int out, off_t *to, size_t size,
                                  unsigned flags) {
  return room(out, 1) < 0 ? -1 : written(copy_file_range(in, from, out, to, size, flags));
}
static int my_ftruncate(int file, off_t size) {
  return room(file, 1) < 0 ? -1 : (int)written(ftruncate(file, size));
}
static int my_fallocate(int file, int mode, off_t at, off_t size) {
  return room(file, 1) < 0 ? -1 : (int)written(fallocate(file, mode, at, size));
}
static int my_posix_fallocate(int file, off_t at, off_t size) {
  return room(file, 1) < 0 ? errno : (int)written(posix_fallocate(file, at, size));
}

static int synced(int file, int (*real)(int)) {
  char path[PATH_MAX];
  struct stat state;
  if (OUTSIDE(file, NULL)) return real(file);
  if (fails(WRITES | TAKES_SPACE)) return -1;
  if (fstat(file, &state)) return -1;
  if (S_ISREG(state.st_mode)) {
    inside = 1;
    copy_synced(file);
    inside = 0;
  }
  note(S_ISDIR(state.st_mode) ? "sync-folder" : "sync", path, "");
  return 0;
}
static int my_fsync(int file) { return synced(file, fsync); }
static int my_fdatasync(int file) { return synced(file, fdatasync); }

/* A rename that comes from here has a word behind its arguments, and is let through. */
static int rename_now(int from, const char *one, int to, const char *other, unsigned flags) {
  return (int)syscall(SYS_renameat2, from, one, to, other, flags, OURS);
}

static int renamed(int from, const char *one, int to, const char *other, unsigned flags) {
  char path[PATH_MAX], second[PATH_MAX];
  if (OUTSIDE(from, one)) return rename_now(from, one, to, other, flags);
  if (flags & RENAME_EXCHANGE && !exchanges) { /* as a file system that cannot */
    errno = EINVAL;
    return -1;
  }
  if (fails(WRITES | TAKES_SPACE)) return -1;
  int done = rename_now(from, one, to, other, flags);
  if (!done && path_of(to, other, second))
    note(flags & RENAME_EXCHANGE ? "exchange" : "rename", path, second);
  return done;
}

#if defined __x86_64__
#define ARGUMENT(c, i) \
  ((c)->uc_mcontext.gregs[(int[]){REG_RDI, REG_RSI, REG_RDX, REG_R10, REG_R8}[i]])
#define RESULT(c) ((c)->uc_mcontext.gregs[REG_RAX])
#elif defined __aarch64__
#define ARGUMENT(c, i) ((c)->uc_mcontext.regs[i])
#define RESULT(c) ((c)->uc_mcontext.regs[0])
#endif

/* Do what a rename asked the kernel for. */
static void trapped(int signal, siginfo_t *info, void *context) {
  ucontext_t *c = context;
  int before = errno;
  long a[5];
  (void)signal;
  for (int i = 0; i < 5; i++) a[i] = (long)ARGUMENT(c, i);
  int done = -1;
#ifdef SYS_rename
  if (info->si_syscall == SYS_rename)
    done = renamed(AT_FDCWD, (const char *)a[0], AT_FDCWD, (const char *)a[1], 0);
  else
#endif
    done = renamed((int)a[0], (const char *)a[1], (int)a[2], (const char *)a[3],
                   info->si_syscall == SYS_renameat2 ? (unsigned)a[4] : 0);
  RESULT(c) = done < 0 ? -errno : done;
  errno = before;
}

/* Let the kernel hand over renames, for good; 0 if it does. */
static int trap_renames(void) {
  struct sigaction action = {.sa_flags = SA_SIGINFO | SA_NODEFER};
  struct sock_filter filter[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
#ifdef SYS_rename
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_rename, 5, 0),
#else
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_renameat, 5, 0),
#endif
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_renameat, 4, 0),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_renameat2, 0, 2),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[5])),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, OURS, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP),
  };
  struct sock_fprog program = {sizeof filter / sizeof *filter, filter};
  action.sa_sigaction = trapped;
  if (sigaction(SIGSYS, &action, NULL)) return -1;
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) return -1;
  return (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program);
}

static int my_linkat(int from, const char *one, int to, const char *other, int flags) {
  char path[PATH_MAX], first[PATH_MAX];
  if (OUTSIDE(to, other)) return linkat(from, one, to, other, flags);
  if (fails(WRITES | TAKES_SPACE)) return -1;
  int done = linkat(from, one, to, other, flags);
  if (!done && path_of(from, one, first)) note("link", first, path);
  return done;
}
static int my_link(const char *one, const char *other) {
  return my_linkat(AT_FDCWD, one, AT_FDCWD, other, 0);
}

/* Calls that name one path, and change its folder. */
#define NAMED(name, op, kind, parameters, call, folder, at) \
  static int name parameters { \
    char path[PATH_MAX]; \
    if (OUTSIDE(folder, at)) return call; \
    if (fails(kind)) return -1; \
    int done = call; \
    if (!done) note(op, path, ""); \
    return done; \
  }
NAMED(my_mkdirat, "mkdir", WRITES | TAKES_SPACE, (int at, const char *name, mode_t mode),
      mkdirat(at, name, mode), at, name)
NAMED(my_symlinkat, "symlink", WRITES | TAKES_SPACE, (const char *to, int at, const char *name),
      symlinkat(to, at, name), at, name)
NAMED(my_unlinkat, "unlink", WRITES, (int at, const char *name, int flags),
      unlinkat(at, name, flags), at, name)
NAMED(my_fchmodat, "mode", WRITES, (int at, const char *name, mode_t mode, int flags),
      fchmodat(at, name, mode, flags), at, name)
NAMED(my_fchmod, "mode", WRITES, (int file, mode_t mode), fchmod(file, mode), file, NULL)

static int my_mkdir(const char *name, mode_t mode) { return my_mkdirat(AT_FDCWD, name, mode); }
static int my_symlink(const char *to, const char *name) {
  return my_symlinkat(to, AT_FDCWD, name);
}
static int my_unlink(const char *name) { return my_unlinkat(AT_FDCWD, name, 0); }
static int my_rmdir(const char *name) { return my_unlinkat(AT_FDCWD, name, AT_REMOVEDIR); }
static int my_chmod(const char *name, mode_t mode) {
  return my_fchmodat(AT_FDCWD, name, mode, 0);
}

static const struct {
  const char *name;
  void *own;
} HOOKS[] = {
    {"open", my_open},           {"open64", my_open},
    {"openat", my_openat},       {"openat64", my_openat},
    {"creat", my_creat},         {"creat64", my_creat},
    {"write", my_write},         {"pwrite", my_pwrite},
    {"pwrite64", my_pwrite},     {"writev", my_writev},
    {"sendfile", my_sendfile},   {"sendfile64", my_sendfile},
    {"ftruncate", my_ftruncate}, {"ftruncate64", my_ftruncate},
    {"fallocate", my_fallocate}, {"fallocate64", my_fallocate},
    {"posix_fallocate", my_posix_fallocate},
    {"posix_fallocate64", my_posix_fallocate},
    {"copy_file_range", my_copy_file_range},
    {"fsync", my_fsync},         {"fdatasync", my_fdatasync},
    {"link", my_link},           {"linkat", my_linkat},
    {"symlink", my_symlink},     {"symlinkat", my_symlinkat},
    {"mkdir", my_mkdir},         {"mkdirat", my_mkdirat},
    {"unlink", my_unlink},       {"unlinkat", my_unlinkat},
    {"rmdir", my_rmdir},         {"fchmodat", my_fchmodat},
    {"chmod", my_chmod},         {"fchmod", my_fchmod},
};

static void *hook_of(const char *name) {
  for (size_t i = 0; i < sizeof HOOKS / sizeof *HOOKS; i++)
    if (!strcmp(HOOKS[i].name, name)) return HOOKS[i].own;
  return NULL;
}

#if defined __x86_64__
#define IS_CALL(type) ((type) == R_X86_64_JUMP_SLOT || (type) == R_X86_64_GLOB_DAT)
#elif defined __aarch64__
#define IS_CALL(type) ((type) == R_AARCH64_JUMP_SLOT || (type) == R_AARCH64_GLOB_DAT)
#endif

static int replace_in(struct dl_phdr_info *library, size_t size, void *own) {
  const ElfW(Dyn) *entry = NULL;
  (void)size;
  if (library->dlpi_addr == (ElfW(Addr))own || strstr(library->dlpi_name, "/libc.so") ||
      strstr(library->dlpi_name, "/ld-") || strstr(library->dlpi_name, "vdso"))
    return 0;
  for (int i = 0; i < library->dlpi_phnum; i++)
    if (library->dlpi_phdr[i].p_type == PT_DYNAMIC)
      entry = (const void *)(library->dlpi_addr + library->dlpi_phdr[i].p_vaddr);
  const ElfW(Sym) *symbols = NULL;
  const char *names = NULL;
  const ElfW(Rela) *tables[2] = {NULL, NULL};
  size_t sizes[2] = {0, 0};
  for (; entry && entry->d_tag != DT_NULL; entry++) {
    ElfW(Addr) at = entry->d_un.d_ptr;
    if (entry->d_tag == DT_SYMTAB) symbols = (const void *)at;
    if (entry->d_tag == DT_STRTAB) names = (const void *)at;
    if (entry->d_tag == DT_JMPREL) tables[0] = (const void *)at;
    if (entry->d_tag == DT_PLTRELSZ) sizes[0] = entry->d_un.d_val;
    if (entry->d_tag == DT_RELA) tables[1] = (const void *)at;
    if (entry->d_tag == DT_RELASZ) sizes[1] = entry->d_un.d_val;
  }
  if (!symbols || !names) return 0;
  size_t page = (size_t)sysconf(_SC_PAGESIZE);
  for (int t = 0; t < 2; t++)
    for (size_t i = 0; tables[t] && i < sizes[t] / sizeof(ElfW(Rela)); i++) {
      const ElfW(Rela) *r = &tables[t][i];
      if (!IS_CALL(ELF64_R_TYPE(r->r_info))) continue;
      void *hook = hook_of(names + symbols[ELF64_R_SYM(r->r_info)].st_name);
      if (!hook) continue;
      void **slot = (void **)(library->dlpi_addr + r->r_offset);
      void *start = (void *)((size_t)slot & ~(page - 1));
      if (!mprotect(start, page, PROT_READ | PROT_WRITE)) *slot = hook;
    }
  return 0;
}

/* Take over the calls of all libraries that are loaded; 0 if that is possible here. */
int faults_install(void) {
  Dl_info self;
  if (!dladdr((void *)faults_install, &self)) return -1;
  dl_iterate_phdr(replace_in, self.dli_fbase);
  return trap_renames();
}

/* Begin to count calls below a folder; at < 1 only counts. */
void faults_arm(const char *folder, const char *log, const char *synced_files, long at, int how,
                int number, int can_exchange) {
  snprintf(watched, sizeof watched, "%s", folder);
  snprintf(store, sizeof store, "%s", synced_files);
  journal = open(log, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0600);
  calls = 0, fails_at = at, what = how, error_number = number, exchanges = can_exchange, full_file = -1;
  armed = 1;
}

/* End counting; how many calls there were. */
long faults_disarm(void) {
  armed = 0;
  if (journal >= 0) close(journal);
  journal = -1;
  return calls;
}
