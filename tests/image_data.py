"""Small data sets in the layouts of the official ones, with images that Pillow encodes."""

import contextlib
import functools
import hashlib
import http.server
import io
import json
import tarfile
import tempfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llvq.data import order
from llvq.errors import UserError

CELEBA = {"train": 8, "validation": 3, "test": 4}
FFHQ = {"train": 12, "validation": 4}
FFHQ_PER_GROUP = 4
PIXELS = 16  # the size of the small FFHQ's images


def refused(words):
    """Expects a UserError of one line that has these words; ^ and $ are the line's ends."""
    return pytest.raises(UserError, match=rf"^[^\n]*(?:{words})[^\n]*$")


def picture(seed, height, width):
    """Something smooth and colourful, unlike any other seed's."""
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encode(image, file_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


@functools.cache
def face_jpeg(number):
    """Of CelebA's size, for a file number; the chroma is subsampled as in the real ones."""
    return encode(picture(number, 218, 178), "JPEG", quality=90, subsampling=2)


def ffhq_image(index):
    return picture(index, PIXELS, PIXELS)


def webp(image):
    return encode(image, "WEBP", lossless=True)


def celeba_files():
    """{path: content} of CelebA as published."""
    splits = np.repeat(range(3), list(CELEBA.values()))
    names = [f"{i:06d}.jpg" for i in range(1, len(splits) + 1)]
    lines = (f"{name} {split}\n" for name, split in zip(names, splits, strict=True))
    images = {f"img_align_celeba/{name}": face_jpeg(i) for i, name in enumerate(names, start=1)}
    return images | {"list_eval_partition.txt": "".join(lines).encode()}


def ffhq_files():
    """{path: content} of FFHQ as published."""
    return {
        f"images1024x1024/{i - i % FFHQ_PER_GROUP:05d}/{i:05d}.png": encode(ffhq_image(i), "PNG")
        for i in range(sum(FFHQ.values()))
    }


def ffhq_tar(start, changes=None):
    """A tar of the hub's copy of FFHQ; `changes` has other members, or None, by name."""
    indices = range(start, start + FFHQ_PER_GROUP)
    return tar_bytes({f"{i:05d}.webp": webp(ffhq_image(i)) for i in indices} | (changes or {}))


def write_folder(files, directory):
    """Writes {path: content} to a directory; what has None is missing."""
    for name, content in files.items():
        if content is not None:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(content)


def write_zip(files, directory):
    """Does the same, with each folder in a zip."""
    directory.mkdir(parents=True, exist_ok=True)
    for folder in {name.split("/")[0] for name in files if "/" in name}:
        with zipfile.ZipFile(directory / f"{folder}.zip", "w") as file:
            file.mkdir(folder)
            for name, content in files.items():
                if name.startswith(f"{folder}/") and content is not None:
                    file.writestr(name, content)
    write_folder({name: content for name, content in files.items() if "/" not in name}, directory)


def load_celeba(data_dir, manual_dir=""):
    from input_pipeline import celeba  # not everyone who wants pictures has TensorFlow

    return celeba.load(str(data_dir), str(manual_dir), num_images=CELEBA)


def load_ffhq(data_dir, manual_dir=""):
    from input_pipeline import ffhq1024

    return ffhq1024.load(
        str(data_dir),
        str(manual_dir),
        num_images=FFHQ,
        images_per_group=FFHQ_PER_GROUP,
        image_shape=(PIXELS, PIXELS, 3),
    )


def read_images(data, split, batch_size=4):
    batches = data.batches(split, order.evaluation_batches(data.num_images[split], batch_size))
    return np.concatenate([images[batch.mask] for batch, images in batches])


def tar_bytes(members):
    """A tar of {name: content}; what has None is missing."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items():
            if content is not None:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def flip(content, place):
    """A file's content with a bit flipped."""
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


class Hub:
    """The hub's copy of FFHQ on a loopback port, and what it was asked for.

    Attributes:
      files: content by file name.
      downloads: the file names asked for with GET, in order.
      on_download: called with the file name before it is served.
      corrupt: file names that are served with a bit flipped.
      status: if not 200, what every request is answered with.
    """

    def __init__(self, dataset, revision):
        self.dataset, self.revision = dataset, revision
        starts = range(0, sum(FFHQ.values()), FFHQ_PER_GROUP)
        self.files = {f"{start:05d}.tar": ffhq_tar(start) for start in starts}
        self.downloads, self.corrupt, self.status = [], set(), 200
        self.on_download = lambda name: None

    def listing(self):
        siblings = []
        for name, content in self.files.items():
            digest = hashlib.sha256(content).hexdigest()
            lfs = {"sha256": digest, "size": len(content), "pointerSize": 134}
            siblings.append({"rfilename": name, "size": len(content), "blobId": "0", "lfs": lfs})
        return {"id": self.dataset, "sha": self.revision, "siblings": siblings}

    def answer(self, path, is_get):
        """(status, headers, body) of a request; see `serve`."""
        resolve = f"/datasets/{self.dataset}/resolve/{self.revision}/"
        name = path.partition("?")[0].removeprefix(resolve)
        if self.status != 200:
            return self.status, {}, b""
        if name == f"/api/datasets/{self.dataset}/revision/{self.revision}":
            return 200, {}, json.dumps(self.listing()).encode()
        if name not in self.files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        content = self.files[name]
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        if is_get:
            self.downloads.append(name)
            self.on_download(name)
            content = flip(content, 600) if name in self.corrupt else content
        return 200, {**headers, "X-Repo-Commit": self.revision}, content


@contextlib.contextmanager
def serve(answer):
    """Serves what a function answers on a free loopback port; gives the address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_GET(self):
            status, headers, body = answer(self.path, self.command == "GET")
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def point_at(url, patch):
    """Has the hub's client ask another address."""
    import huggingface_hub.constants

    patch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def prepare_fashion_mnist(contents, data_dir, file_format):
    """Has TFDS prepare FashionMNIST from {name: content} of the two IDX files of images."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.image_classification import mnist

    counts = {name: (len(content) - 16) // 28**2 for name, content in contents.items()}
    with tempfile.TemporaryDirectory() as raw, pytest.MonkeyPatch.context() as patch:
        for name, content in contents.items():
            Path(raw, name).write_bytes(content)
            labels = name.replace("images-idx3", "labels-idx1")
            Path(raw, labels).write_bytes(bytes(8 + counts[name]))
        patch.setattr(mnist, "_TRAIN_EXAMPLES", counts["train-images-idx3-ubyte"])
        patch.setattr(mnist, "_TEST_EXAMPLES", counts["t10k-images-idx3-ubyte"])
        patch.setattr(
            tfds.download.DownloadManager,
            "download_and_extract",
            lambda _, urls: {
                key: str(Path(raw, url.rsplit("/", 1)[1].removesuffix(".gz")))
                for key, url in urls.items()
            },
        )
        tfds.builder(
            "fashion_mnist", data_dir=data_dir, file_format=file_format
        ).download_and_prepare()


def prepare_celeb_a(data_dir, file_format, num_shards):
    """Has TFDS prepare CelebA."""
    import tensorflow_datasets as tfds

    module = __import__(tfds.builder_cls("celeb_a").__module__, fromlist=["_"])
    files = celeba_files()
    partition = files["list_eval_partition.txt"].decode()
    names = [line.split()[0] for line in partition.splitlines()]
    annotations = {
        "list_eval_partition": partition,
        "identity_celeba": "".join(f"{name} 1\n" for name in names),
    }
    for key, headings in (
        ("list_attr_celeba", module.ATTR_HEADINGS),
        ("landmarks_celeba", module.LANDMARK_HEADINGS),
    ):
        lines = [str(len(names)), " ".join(headings)]
        lines += [f"{name} {'1 ' * len(headings)}" for name in names]
        annotations[key] = "\n".join(lines) + "\n"
    with tempfile.TemporaryDirectory() as raw, pytest.MonkeyPatch.context() as patch:
        for key, text in annotations.items():
            Path(raw, key).write_text(text)
        manager = tfds.download.DownloadManager
        patch.setattr(manager, "download", lambda _, urls: {key: Path(raw, key) for key in urls})
        images = [(name, content) for name, content in files.items() if "/" in name]
        patch.setattr(manager, "iter_archive", lambda *_: iter(images))
        tfds.builder("celeb_a", data_dir=data_dir, file_format=file_format).download_and_prepare(
            download_config=tfds.download.DownloadConfig(num_shards=num_shards)
        )
