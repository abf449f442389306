"""The CUDA branch of the trainer on a machine without a GPU.

Tensors are FakeTensors of device cuda: they have a shape, a dtype, strides and a device, and no numbers. `guard.cpp`
lets autograd run them on torch's CPU build, `fake_cuda.py` stands for torch.cuda, the fake process group for NCCL. So a
whole step of the engine runs, and `counting.py` notes what it would do to a GPU. What this cannot show: numbers, and
what only a driver does.
"""
