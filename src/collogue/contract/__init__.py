"""What is computed: formats, descriptions, the reference in PyTorch."""
