"""What kernel backends share: cutting sequences into chunks and pieces, allocating outputs."""
