"""A picture as text: what pages and APIs take where an address of one stands."""

import base64
import io

from minigpt4.model.image import Picture


def data_url(picture: Picture, side: int, quality: int = 90) -> str:
    """The picture as a JPEG `data:` URL, scaled down to `side` where it is longer."""
    small = picture.rgb.copy()
    small.thumbnail((side, side))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
