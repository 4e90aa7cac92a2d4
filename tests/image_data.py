"""Small data sets in the layouts of the official ones, with images that Pillow encodes."""

import contextlib
import hashlib
import http.server
import io
import json
import tarfile
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llvq.data import order

PIXELS = 16  # the size of the small FFHQ's images


def picture(seed, height, width):
    """Something smooth and colourful, unlike any other seed's."""
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encode(image, file_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def face_jpeg(number):
    """Of CelebA's size, for a file number; the chroma is subsampled as in the real ones."""
    return encode(picture(number, 218, 178), "JPEG", quality=90, subsampling=2)


def ffhq_image(index):
    return picture(index, PIXELS, PIXELS)


def webp(image):
    return encode(image, "WEBP", lossless=True)


def read_images(data, split, batch_size=4):
    batches = data.batches(split, order.evaluation_batches(data.num_images[split], batch_size))
    return np.concatenate([images[batch.mask] for batch, images in batches])


def tar_bytes(members):
    """A tar of (name, content) pairs."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


class Hub:
    """What a hub serves of one revision of one data set, and what it was asked for.

    Attributes:
      files: content by file name.
      downloads: the file names asked for with GET, in order.
      on_download: called with the file name before it is served.
      corrupt: file names that are served with a bit flipped.
      status: if not 200, what every request is answered with.
    """

    def __init__(self, dataset, revision):
        self.dataset, self.revision = dataset, revision
        self.files, self.downloads, self.corrupt = {}, [], set()
        self.on_download = lambda name: None
        self.status = 200
        self.url = ""

    def listing(self):
        siblings = []
        for name, content in self.files.items():
            digest = hashlib.sha256(content).hexdigest()
            lfs = {"sha256": digest, "size": len(content), "pointerSize": 134}
            siblings.append({"rfilename": name, "size": len(content), "blobId": "0", "lfs": lfs})
        return {"id": self.dataset, "sha": self.revision, "siblings": siblings}


@contextlib.contextmanager
def serve(hub):
    """Serves a hub on a free loopback port; hub.url is its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.answer(with_body=False)

        def do_GET(self):
            self.answer(with_body=True)

        def answer(self, with_body):
            path = self.path.partition("?")[0]
            api = f"/api/datasets/{hub.dataset}/revision/{hub.revision}"
            resolve = f"/datasets/{hub.dataset}/resolve/{hub.revision}/"
            name = path.removeprefix(resolve)
            if hub.status != 200:
                self.reply(hub.status, b"", {}, with_body)
            elif path == api:
                self.reply(200, json.dumps(hub.listing()).encode(), {}, with_body)
            elif path.startswith(resolve) and name in hub.files:
                content = hub.files[name]
                etag = hashlib.sha256(content).hexdigest()
                if with_body:
                    hub.downloads.append(name)
                    hub.on_download(name)
                    if name in hub.corrupt:
                        content = content[:600] + bytes([content[600] ^ 1]) + content[601:]
                headers = {"ETag": f'"{etag}"', "X-Repo-Commit": hub.revision}
                self.reply(200, content, headers, with_body)
            else:
                self.reply(404, b"", {"X-Error-Code": "EntryNotFound"}, with_body)

        def reply(self, status, content, headers, with_body):
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if with_body:
                self.wfile.write(content)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def prepare_fashion_mnist(contents, data_dir, file_format):
    """Has TFDS prepare FashionMNIST from {name: content} of the two IDX files of images."""
    import tensorflow_datasets as tfds  # not everyone who wants pictures has TensorFlow
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
