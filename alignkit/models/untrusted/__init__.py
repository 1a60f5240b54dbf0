"""Checks of folders and files from strangers, made before any library opens them.

What holds: weights are read from safetensors alone, and a pickle is never run. A folder's `.bin`, `.pt`, `.pth`,
`.ckpt` and `.pkl` files are not opened; where they are all there is, the folder is refused with the remedy. PyTorch's
own files of a checkpoint (optimizer, scheduler, random generators) go through `torch_files.read_torch`. A name that a
file gives for another file stays inside the folder, symlinks included; a snapshot in the Hub's cache may link to its
blobs. What would take more memory or time than its bytes justify is refused by what its header says.

Not covered: a `trust_remote_code=True` run, which runs the repository's code by wish; somebody who changes files while
they are read; and weights that are well-formed and make a bad model.
"""
