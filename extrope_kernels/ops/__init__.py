"""The operations, a folder each: public function, op schema, reference and kernels."""
