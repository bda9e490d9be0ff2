"""The Triton kernels of focalkern and their launch configurations; imports nothing from focalkern."""
