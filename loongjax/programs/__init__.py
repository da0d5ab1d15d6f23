"""What is compiled: specs and buckets, how programs are built, and the library that keeps
them in memory and on disk.
"""
