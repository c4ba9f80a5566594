"""A model of a Hopper that runs Gluon kernels on the CPU, for want of an interpreter of theirs.

It runs a kernel's own source: names of Triton stand for functions of this package (`language`), and
so do those of the kernel's modules for copies that see these. Programs and their workers run in an
order that a seed decides, and asynchronous work at some moment before someone waits for it
(`schedule`); accesses to shared memory that nothing orders, what no fence has shown to the engines,
and workers that wait for each other are errors (`memory`).

What it does not know: layouts, registers, bank conflicts, synchronisation among the threads of a
worker, and time.
"""
