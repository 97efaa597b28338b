"""Images as people have them — folders, datasets, lists, arrays — as batches of tensors for a network."""

from bayesdiff.data.framing import Framing as Framing
from bayesdiff.data.images import ImageData as ImageData
from bayesdiff.data.images import open_images as open_images
from bayesdiff.data.labels import known_classes as known_classes
from bayesdiff.data.model import images_for as images_for
from bayesdiff.data.model import modules_of as modules_of
