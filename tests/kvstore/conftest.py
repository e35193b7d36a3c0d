"""Engine tests run one torch thread: two spinning OpenMP threads on a busy 2-core machine cost seconds, not less."""

import torch

torch.set_num_threads(1)
