"""The Triton kernels of focalkern and their launch configurations. Imports torch-free; nothing here knows
focalkern."""
