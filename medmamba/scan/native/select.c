// Which instruction sets of this library the processor can run, best first; compiled without any.
__attribute__((visibility("default"))) const char *medmamba_scan_isas(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
        return "avx512 avx2 sse2";
    return avx2 ? "avx2 sse2" : "sse2";
#elif defined(__aarch64__)
    return "neon";
#else
    return "";
#endif
}
