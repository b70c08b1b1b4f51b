"""sparseforge_fx: a torch.export / FX compiler that makes PyTorch models 2:4 sparse and keeps their accuracy."""
