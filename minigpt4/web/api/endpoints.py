"""All that programs may ask: the API, health and metrics."""

from starlette.applications import Starlette
from starlette.routing import BaseRoute

from minigpt4.remote.engine import RemoteEngine
from minigpt4.web.api.asking import Asking
from minigpt4.web.api.health import Health
from minigpt4.web.api.keys import Keys
from minigpt4.web.api.metrics import Metrics
from minigpt4.web.api.routes import Api
from minigpt4.web.guard.image_url import ImageUrls


def endpoints(asking: Asking, keys: Keys, max_picture_bytes: int) -> list[BaseRoute]:
    """Their routes, which stand before the page's own where there is one."""
    api = Api(asking, keys, max_picture_bytes)
    metrics = Metrics(asking.find_engine, api.responses, keys)
    return [*api.routes, *Health(asking.find_engine).routes, *metrics.routes]


def application(
    engine: RemoteEngine, api_key: str = "", image_hosts: str = "", max_upload_mb: int = 20
) -> Starlette:
    """The endpoints alone, without a page."""
    max_bytes = max_upload_mb * 2**20
    asking = Asking(lambda: engine, ImageUrls(image_hosts.split(","), max_bytes))
    return Starlette(routes=endpoints(asking, Keys(api_key), max_bytes))
