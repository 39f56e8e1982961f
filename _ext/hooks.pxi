# Who listens at the sites of a plan. Names are for the border: here a site is a place in the list of operations, and a
# pass with listeners is one loop over the roll, which holds the GIL for Python's hooks alone.

cdef struct Listening:                                   # of a hook, for those without the GIL
    int64_t every
    bint totals                                          # a probe adds up what it measures
    int64_t step                                         # of its last call, -1 before
    bint removed

cdef struct Entry:                                       # one hook at one site
    int64_t at                                           # operations before the site
    Listening *hook
    Statistics *tally                                    # a probe's; NULL for a Python hook
    Statistics *total
    const void *data
    int64_t count
    bint wide                                            # double, not float


cdef tuple told(const Statistics *s):
    return s.count, s.mean, s.mean_abs, s.variance, s.min, s.max, s.zeros, s.nan, s.inf, s.l2


def statistics(x, size_t measure) -> tuple:
    """Count, mean, mean of |x|, population variance, min, max, zeros, NaN, Inf and L2 norm of a contiguous array.

    ``measure`` is where an instruction set has its `statistics`.
    """
    cdef Statistics s
    cdef bint wide = x.itemsize == sizeof(double)
    cdef size_t data = x.ctypes.data
    cdef int64_t count = x.size
    cdef uint64_t environment
    if x.dtype not in (np.float32, np.float64) or not x.flags.c_contiguous:
        raise ValueError(f"expected contiguous float32 or float64, got {x.dtype} with strides {x.strides}")
    with nogil:
        environment = fpenv_enter()
        (<Measure>measure)(<const void *>data, wide, count, &s)
        fpenv_set(environment)
    return told(&s)


cdef class Tally:
    """What a probe has measured at one site: the last time, and in all."""

    cdef Statistics s
    cdef Statistics sum

    def __cinit__(self):
        self.s.count = self.sum.count = -1

    def told(self) -> tuple:
        """As `statistics` gives them, or None where the probe has not fired yet."""
        return told(&self.s) if self.s.count >= 0 else None

    def total(self) -> tuple:
        """Of all that was measured since `reset`, as if it had been one tensor; None where there is none."""
        return told(&self.sum) if self.sum.count >= 0 else None

    def reset(self) -> None:
        """Forget both."""
        self.s.count = self.sum.count = -1


cdef class Hook:
    """``call(site, view)`` at every step that is a multiple of ``every``; a probe where ``call`` is None.

    With ``totals`` a probe also adds up what it measures.
    """

    cdef Listening listening
    cdef readonly object call
    cdef readonly dict tallies

    def __cinit__(self, call, int64_t every, bint totals=False):
        self.call = call
        self.tallies = {}
        self.listening.totals = totals
        self.listening.every = every
        self.listening.step = -1

    @property
    def step(self) -> int:
        return self.listening.step

    @property
    def removed(self) -> bool:
        return self.listening.removed

    def remove(self) -> None:
        """Not called again, not even in the pass that is running."""
        self.listening.removed = True


cdef class Roll:
    """The hooks of one plan, called in this order: ``(operations before the site, site, view, hook)``.

    A pass in progress keeps its roll: who is added meanwhile is called from the next pass on.
    """

    cdef Entry *entries
    cdef int64_t length
    cdef list _calls                                     # (hook, site, view), which the entries' addresses live in
    cdef Measure measure
    cdef Merge merge

    def __cinit__(self, list heard, size_t measure, size_t merge):
        cdef Entry *entry
        cdef Hook hook
        cdef Tally tally
        self.entries = <Entry *>calloc(len(heard) + 1, sizeof(Entry))
        if self.entries == NULL:
            raise MemoryError
        self._calls = []
        self.measure = <Measure>measure
        self.merge = <Merge>merge
        for at, site, view, hook in heard:
            entry = self.entries + self.length
            entry.at = at
            entry.hook = &hook.listening
            entry.data = <const void *><size_t>view.ctypes.data
            entry.count = view.size
            entry.wide = view.itemsize == sizeof(double)
            if hook.call is None:
                tally = hook.tallies.setdefault(site, Tally())
                entry.tally = &tally.s
                entry.total = &tally.sum
            self._calls.append((hook, site, view))
            self.length += 1

    def __dealloc__(self):
        free(self.entries)

    cdef int64_t due(self, int64_t i, int64_t step) noexcept nogil:
        """The first entry from i on that is called at this step; the length where there is none."""
        cdef Listening *hook
        while i < self.length:
            hook = self.entries[i].hook
            if not hook.removed and (hook.every == 1 or step % hook.every == 0):
                hook.step = step
                break
            i += 1
        return i

    def run(self, program, int64_t step, failed) -> None:
        """A pass: each hook after the operations before its site, then the rest of ``program``.

        ``failed(hook, site, error)`` makes the exception that ends the pass where a Python hook raised one. A hook
        that leaves another floating-point environment behind has it put back.
        """
        cdef Program compiled = program if isinstance(program, Program) else None
        cdef int64_t i = 0, done = 0, upto, length = program.length
        cdef Entry *entry
        cdef int forked = 0
        cdef uint64_t environment
        while True:
            with nogil:
                environment = fpenv_enter()
                while True:
                    i = self.due(i, step)
                    upto = self.entries[i].at if i < self.length else length
                    if upto > done:
                        if compiled is None:
                            break
                        forked = pool_run(&compiled.pool.c, compiled.ops, done, upto)
                        done = upto
                        if forked:
                            break
                    if i == self.length or self.entries[i].tally == NULL:
                        break
                    entry = self.entries + i
                    self.measure(entry.data, entry.wide, entry.count, entry.tally)
                    if entry.hook.totals:
                        self.merge(entry.total, entry.tally)
                    i += 1
                fpenv_set(environment)
            if forked:
                raise RuntimeError(FORKED)
            if upto > done:                              # the NumPy twins
                program.run(done, upto)
                done = upto
            elif i == self.length:
                return
            else:
                hook, site, view = self._calls[i]
                try:
                    (<Hook>hook).call(site, view)
                except Exception as error:
                    raise failed((<Hook>hook).call, site, error) from error
                finally:
                    fpenv_set(environment)
                i += 1
