"""Execute the PTX that Triton compiles for sm_80, sm_90 and sm_100 on a CPU; see README.md."""
