"""What goes through random models: so many numbers per example, seen in some shape, and so many ids."""

WIDTH = 32
IMAGE = (2, 4, 4)
SEQUENCE = (4, 8)
IDS = 7  # how many different ids there are, 0 among them
IDS_PER_EXAMPLE = 5
