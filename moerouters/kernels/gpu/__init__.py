"""The Triton kernels and their launches, one operation a file. Importing one imports triton: do it where it is used."""
