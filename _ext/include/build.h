// How this module was compiled, for `minitrain --version`. setup.py gives MINITRAIN_FLAGS.
#ifndef MINITRAIN_BUILD_H
#define MINITRAIN_BUILD_H
#ifndef MINITRAIN_FLAGS
#define MINITRAIN_FLAGS "unknown flags"
#endif
#if defined(__clang__)
#define MINITRAIN_COMPILER __VERSION__  // names itself
#elif defined(__GNUC__)
#define MINITRAIN_COMPILER "gcc " __VERSION__
#else
#define MINITRAIN_COMPILER "unknown compiler"
#endif
#endif
