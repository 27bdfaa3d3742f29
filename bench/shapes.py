"""Shapes of the audit and of the benchmarks on a GPU: Llama-3 8B's layers."""

HEADS_Q, HEADS_K, HEAD_DIM = 32, 8, 128
SEQLEN, WINDOW = 8192, 1024
LENGTHS = (SEQLEN, 32_768, 131_072)
CHUNK, LOCAL, BLOCK = 1536, 512, 2048  # of dual chunk and of blockwise causal attention
# One token for each of several sequences over a paged cache.
BATCH, KEYS, KEYS_WINDOW, PAGE_SIZE = 2, 32_768, 4096, 16
