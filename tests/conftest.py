"""One thread for torch in every test: threads that wait for each other cost more than they give on two cores."""

import torch

torch.set_num_threads(1)
