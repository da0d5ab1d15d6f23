"""Compiling for accelerators on machines that have none.

`targets`    what can be compiled for, and its devices as the compiler sees them
`compilers`  the virtual environments with the compilers of TPU and GPU
`kernels`    compiles single kernels, each target in a process that may die
"""
