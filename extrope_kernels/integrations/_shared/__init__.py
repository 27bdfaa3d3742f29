"""What the integrations have in common."""
