"""What PyTorch asks of every op: registration, derivatives, backends, DTensors, layouts."""
