/* A plugin of QEMU 7.2 (user emulation) that counts a guest's instructions between marks.
 *
 *   gcc -O2 -fPIC -shared -fvisibility=hidden -o count.so count_instructions.c
 *   qemu-aarch64 -plugin ./count.so -d plugin PROGRAM ...
 *
 * A mark is a call of getppid(), number 173 on aarch64. It prints what all threads have run since
 * the mark before, "mark INSTRUCTIONS", and then of each block of code that is at least one in
 * 5,000 of that "block RUNS WORD WORD ...", with its instructions as they are encoded. The few
 * functions of QEMU that are used are declared here: Debian packages no header of theirs. */
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
enum { kGetppid = 173, kMost = 512 };

typedef uint64_t Id;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
struct qemu_info;
typedef void (*Translated)(Id, struct qemu_plugin_tb*);
typedef void (*Executed)(unsigned vcpu, void* data);
typedef void (*Syscall)(Id, unsigned vcpu, int64_t number, uint64_t, uint64_t, uint64_t, uint64_t,
                        uint64_t, uint64_t, uint64_t, uint64_t);
extern void qemu_plugin_register_vcpu_tb_trans_cb(Id, Translated);
extern void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb*, Executed, int flags,
                                                 void* data);
extern void qemu_plugin_register_vcpu_syscall_cb(Id, Syscall);
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb*);
extern struct qemu_plugin_insn* qemu_plugin_tb_get_insn(const struct qemu_plugin_tb*, size_t);
extern const void* qemu_plugin_insn_data(const struct qemu_plugin_insn*);
extern void qemu_plugin_outs(const char*);

EXPORT int qemu_plugin_version = 1;

typedef struct Block {
  struct Block* next;
  uint64_t runs;
  unsigned size;
  uint32_t words[];
} Block;

static Block* blocks;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

static void executed(unsigned vcpu, void* data) {
  (void)vcpu;
  __atomic_fetch_add(&((Block*)data)->runs, 1, __ATOMIC_RELAXED);
}

static void translated(Id id, struct qemu_plugin_tb* tb) {
  (void)id;
  const size_t n = qemu_plugin_tb_n_insns(tb);
  Block* block = calloc(1, sizeof *block + n * sizeof block->words[0]);
  block->size = n;
  for (size_t i = 0; i < n; ++i) {
    memcpy(&block->words[i], qemu_plugin_insn_data(qemu_plugin_tb_get_insn(tb, i)), 4);
  }
  pthread_mutex_lock(&mutex);
  block->next = blocks;
  blocks = block;
  pthread_mutex_unlock(&mutex);
  qemu_plugin_register_vcpu_tb_exec_cb(tb, executed, 0, block);
}

static void called(Id id, unsigned vcpu, int64_t number, uint64_t a, uint64_t b, uint64_t c,
                   uint64_t d, uint64_t e, uint64_t f, uint64_t g, uint64_t h) {
  (void)id, (void)vcpu, (void)a, (void)b, (void)c, (void)d, (void)e, (void)f, (void)g, (void)h;
  if (number != kGetppid) return;
  pthread_mutex_lock(&mutex);
  uint64_t all = 0;
  for (const Block* block = blocks; block != NULL; block = block->next) {
    all += block->runs * block->size;
  }
  char line[64 + 9 * kMost];
  snprintf(line, sizeof line, "mark %" PRIu64 "\n", all);
  qemu_plugin_outs(line);
  for (Block* block = blocks; block != NULL; block = block->next) {
    if (block->runs * block->size >= all / 5000 + 1 && block->size <= kMost) {
      int at = snprintf(line, sizeof line, "block %" PRIu64, block->runs);
      for (unsigned i = 0; i < block->size; ++i) {
        at += snprintf(line + at, sizeof line - at, " %08" PRIx32, block->words[i]);
      }
      snprintf(line + at, sizeof line - at, "\n");
      qemu_plugin_outs(line);
    }
    block->runs = 0;
  }
  pthread_mutex_unlock(&mutex);
}

EXPORT int qemu_plugin_install(Id id, const struct qemu_info* info, int argc, char** argv) {
  (void)info, (void)argc, (void)argv;
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_vcpu_syscall_cb(id, called);
  return 0;
}
