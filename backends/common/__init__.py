"""Code that the kernel backends share: chunks and pieces of sequences, allocation of outputs."""
