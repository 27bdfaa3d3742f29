"""What a model does: its rotary embeddings, its layers, and how these call their attention."""
