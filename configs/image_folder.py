"""Your own images: every PNG, JPEG and WebP file of a folder.

    python main.py --config=configs/image_folder.py:sparse_lattice \
        --config.dataset.manual_dir=/my/photos --workdir=runs/photos

A number in the argument is the size of the square images that the network sees, 64 by default:
`configs/image_folder.py:sparse_lattice,standard,256`. The recipe is `standard` by default.
docs/data.md has the fields, and the memory that each size needs.
"""

from ml_collections import ConfigDict

from configs import default
from llvq.errors import UserError

# (hidden_dims, batch_size) by size.
SIZES = {
    64: ((64,), 64),
    128: ((64,), 32),
    256: ((16, 32), 64),
    512: ((16, 32), 32),
    1024: ((16, 32), 32),
}


def get_config(argument: str = "") -> ConfigDict:
    """See configs/default.py for the argument, llvq/config.py for the fields."""
    words = argument.split(",")
    numbers = [word for word in words if word.isdecimal()]
    size = numbers[0] if numbers else "64"
    if size not in map(str, SIZES):
        raise UserError(f"size {size!r}: choose one of {', '.join(map(str, SIZES))}")
    config = default.get_config(",".join(word for word in words if word != size), "standard")
    config.dataset.name = "image_folder"
    config.dataset.fit = "resize"
    config.dataset.flip = True
    config.model.image_shape = (int(size), int(size), 3)
    config.model.hidden_dims, config.batch_size = SIZES[int(size)]
    return config
