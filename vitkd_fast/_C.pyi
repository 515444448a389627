# The compiled operations (csrc/ops.cpp): importing it registers them with torch.

cuda: str
