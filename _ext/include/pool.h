// Threads for programs: each runs its fixed share of every operation, with a barrier where the kind of share changes.
//
// Who waits spins for some 50 us, giving way to others, and then sleeps, so that a busy machine is not made busier. The
// shares depend on the operation's units, its place and the number of threads alone; no operation's bits depend on them.
#ifndef MINITRAIN_POOL_H
#define MINITRAIN_POOL_H
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include "fpenv.h"
#include "op.h"

#define POOL_LIMIT 64
#define SPIN_NANOSECONDS 50000

typedef struct {
  pthread_mutex_t lock;
  pthread_cond_t changed;
  atomic_uint value;
  atomic_int sleepers;
} Signal;  // a counter that threads can wait for

typedef struct Pool {
  int threads;
  pid_t process;         // a fork copies this struct, but not the threads
  pthread_mutex_t busy;  // one program at a time
  pthread_t thread[POOL_LIMIT];
  Signal job, released;  // programs handed out, barriers passed
  atomic_int at_barrier;
  atomic_int quit;
  const Op *ops;
  int64_t first, last;
  float *scratch[POOL_LIMIT];
} Pool;

typedef struct { Pool *pool; int id; } Worker;

static inline void signal_init(Signal *s) {
  pthread_mutex_init(&s->lock, 0);
  pthread_cond_init(&s->changed, 0);
  atomic_init(&s->value, 0);
  atomic_init(&s->sleepers, 0);
}

static inline void signal_add(Signal *s) {
  atomic_fetch_add(&s->value, 1);
  if (atomic_load(&s->sleepers)) {
    pthread_mutex_lock(&s->lock);
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
  }
}

static inline void relax(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

static inline int64_t nanoseconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

// wait until the counter is no longer `old`
static inline void signal_wait(Signal *s, unsigned old) {
  int64_t since = 0;
  for (int spins = 1; atomic_load_explicit(&s->value, memory_order_acquire) == old; spins++) {
    relax();
    if (spins % 64) continue;
    sched_yield();  // whoever is waited for may want this very core
    int64_t now = nanoseconds();
    if (!since) since = now;
    if (now - since < SPIN_NANOSECONDS) continue;
    pthread_mutex_lock(&s->lock);
    atomic_fetch_add(&s->sleepers, 1);
    while (atomic_load(&s->value) == old) pthread_cond_wait(&s->changed, &s->lock);
    atomic_fetch_sub(&s->sleepers, 1);
    pthread_mutex_unlock(&s->lock);
  }
}

static inline void pool_barrier(Pool *pool) {
  if (pool->threads == 1) return;
  unsigned passed = atomic_load(&pool->released.value);
  if (atomic_fetch_add(&pool->at_barrier, 1) == pool->threads - 1) {
    atomic_store(&pool->at_barrier, 0);
    signal_add(&pool->released);
  } else {
    signal_wait(&pool->released, passed);
  }
}

// whether what a thread reads of the operation before can only be what it wrote itself, or (but for sequences) nothing
static inline int same_shares(const Op *op, const Op *before) {
  return op->split == before->split && (op->split != SPLIT_SEQUENCE || op->units == before->units);
}

// Where the share of thread `id` begins. Of a layer it is a run of elements, whatever tensors they belong to: a thread then
// reads the activations behind few gradients, rather than a part of all, and updates what it has made the gradient of.
static inline int64_t share_begins(const Op *op, int64_t id) {
  if (!op->layer || id == 0 || id == op->threads) return op->units * id / op->threads;
  int64_t unit = (op->layer * id / op->threads - op->before + op->each / 2) / op->each;
  return unit < 0 ? 0 : unit > op->units ? op->units : unit;
}

static inline void pool_share(Pool *pool, int id) {
  uint64_t environment = fpenv_enter();
  for (int64_t i = pool->first; i < pool->last; i++) {
    const Op *op = pool->ops + i;
    if (i > pool->first && !same_shares(op, op - 1)) pool_barrier(pool);
    int64_t lo = share_begins(op, id), hi = share_begins(op, id + 1);
    if (lo < hi) op->kernel(op, lo, hi, pool->scratch[id]);
  }
  fpenv_set(environment);
}

static void *pool_worker(void *argument) {
  Worker worker = *(Worker *)argument;
  free(argument);
  Pool *pool = worker.pool;
  for (unsigned seen = 0;; seen++) {
    signal_wait(&pool->job, seen);
    if (atomic_load(&pool->quit)) return 0;
    pool_share(pool, worker.id);
    pool_barrier(pool);
  }
}

// 0, or an errno; on failure the pool has as many threads as could be started
static inline int pool_start(Pool *pool, int threads) {
  memset(pool, 0, sizeof *pool);
  pool->process = getpid();
  pthread_mutex_init(&pool->busy, 0);
  signal_init(&pool->job);
  signal_init(&pool->released);
  pool->threads = 1;
  for (int id = 1; id < threads; id++) {
    Worker *worker = malloc(sizeof *worker);
    if (!worker) return 12;
    *worker = (Worker){pool, id};
    int error = pthread_create(&pool->thread[id], 0, pool_worker, worker);
    if (error) { free(worker); return error; }
    pool->threads++;
  }
  return 0;
}

// 0, or 1 if the threads were left behind by a fork; waits for a program that another thread runs
static inline int pool_run(Pool *pool, const Op *ops, int64_t first, int64_t last) {
  if (pool->threads > 1 && pool->process != getpid()) return 1;
  pthread_mutex_lock(&pool->busy);
  pool->ops = ops;
  pool->first = first;
  pool->last = last;
  if (pool->threads > 1) signal_add(&pool->job);
  pool_share(pool, 0);
  pool_barrier(pool);
  pthread_mutex_unlock(&pool->busy);
  return 0;
}

static inline void pool_stop(Pool *pool) {
  if (pool->threads <= 1 || pool->process != getpid()) return;
  atomic_store(&pool->quit, 1);
  signal_add(&pool->job);
  for (int id = 1; id < pool->threads; id++) pthread_join(pool->thread[id], 0);
}
#endif
