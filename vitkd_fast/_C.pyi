# The compiled operations (csrc/binding/module.cpp): importing it registers them with torch.

cuda: str
