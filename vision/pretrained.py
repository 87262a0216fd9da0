"""Models in a folder or on the hub: config.json (the constructor's keywords) and model.safetensors (the weights)."""

import fcntl
import inspect
import os
import re
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from torch import nn

from driftfield.training.atomic_file import write_text
from driftfield.training.pretrained import CONFIG_FILE, WEIGHTS_FILE, read_arguments, read_weights, write_model
from driftfield.training.sharding import class_name
from vision.model_card import model_card
from vision.release import (
    ARRAYS_FILE,
    METADATA_FILE,
    RELEASE_PREFIX,
    RELEASED,
    download,
    download_release,
    first_line,
    require_files,
)
from vision.release_layout import MODELS
from vision.release_model import convert_release

CARD_FILE = "README.md"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")  # owner/name


class Pretrained(nn.Module):
    """A module that can be written to a folder and built again from it; its class sets `config` when constructed."""

    config: dict[str, Any]  # the keywords that build this module again

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json and model.safetensors into a folder, each whole or not at all.

        Of several processes, the main one writes; where the model is sharded, all must call this.

        Args:
            folder: made if it does not exist; the two files in it are replaced, config.json last.

        Raises:
            OSError: if the disk refuses; a file is then as it was.
        """
        write_model(Path(folder), self, class_name(self), self.config)

    def push_to_hub(
        self,
        repository: str,
        *,
        dataset: str | None = None,
        metrics: Mapping[str, float | str] | None = None,
        license: str = "mit",
        private: bool = False,
    ) -> str:
        """Put the model into a repository of the Hugging Face hub, with a README.md that says what it is.

        Args:
            repository: "owner/name"; made if it does not exist.
            dataset: what the model was trained on, for the README.md.
            metrics: values by name, for the README.md.
            license: identifier of the weights' licence. The release's weights carry none, so these are not yours to
                put under one.
            private: keep a repository that is made here to its owner.

        Raises:
            ValueError: the name is no hub id.
            OSError: the hub can't be reached, or refuses.

        Returns:
            Address of the repository.
        """
        if not HUB_ID.fullmatch(repository):
            raise ValueError(f"repository: expected a hub id 'owner/name', found {repository!r}")
        import huggingface_hub  # takes a second, and only the hub needs it

        card = model_card(
            repository=repository, model=type(self).__name__, module=type(self).__module__,
            description=_first_sentence(type(self)), num_parameters=sum(p.numel() for p in self.parameters()),
            arguments=self.config, license=license, dataset=dataset, metrics=metrics,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            write_text(Path(folder) / CARD_FILE, card)
            hub = huggingface_hub.HfApi()
            try:
                address = hub.create_repo(repository, private=private, exist_ok=True)
                hub.upload_folder(
                    repo_id=repository, folder_path=folder, commit_message=f"Upload {type(self).__name__}"
                )
            except Exception as error:  # the errors of whichever HTTP library the hub's client uses are among them
                raise OSError(
                    f"{repository}: expected to write to it, but the hub says: {first_line(error)}; "
                    "`hf auth login` stores a token that may"
                ) from error
        return str(address)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], *, revision: str | None = None) -> Self:
        """Build the model from a folder or from the Hugging Face hub, on the CPU, in eval mode.

        Args:
            source: folder with config.json and model.safetensors, a hub id "owner/name", or "hf://NAME" for a model of
                the authors' release, such as "hf://latent_L_sota": it is converted once, into the folder `driftfield`
                beside the hub's own cache, and found there from then on.
            revision: commit, tag or branch of the hub repository.

        Raises:
            FileNotFoundError: neither a folder nor a hub id, a file is absent, or the hub can't be reached.
            ValueError: config.json is another model's, or its arguments or the weights do not fit the model.

        Returns:
            The model; every weight of the file is used and none of the model is left as it was.
        """
        folder = _folder_of(source, revision, cls)
        return read_weights(folder, lambda: cls(**read_arguments(folder, cls.__name__)))


def _folder_of(source: str | os.PathLike[str], revision: str | None, model: type[nn.Module]) -> Path:
    folder, name = Path(source), str(source)
    if name.startswith(RELEASE_PREFIX):
        return _converted(name.removeprefix(RELEASE_PREFIX), revision, model)
    if not folder.is_dir():
        if not HUB_ID.fullmatch(name):
            raise FileNotFoundError(f"{source}: expected a folder or a hub id 'owner/name'; there is no such folder")
        try:
            folder = download(name, [CONFIG_FILE, WEIGHTS_FILE], revision=revision)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error}; without a network, fetch {CONFIG_FILE} and {WEIGHTS_FILE} elsewhere, put the two into a "
                "folder and name the folder instead"
            ) from error
    elif (folder / ARRAYS_FILE).is_file() and not (folder / WEIGHTS_FILE).is_file():
        raise FileNotFoundError(
            f"{folder}: expected {CONFIG_FILE} and {WEIGHTS_FILE}, found the release's {ARRAYS_FILE}; "
            f"python -m vision.convert source={folder} out=FOLDER makes them of it"
        )
    require_files(folder, [CONFIG_FILE, WEIGHTS_FILE])
    return folder


def _converted(name: str, revision: str | None, model: type[nn.Module]) -> Path:
    """Folder of a converted model of the release, the first time converted by one of a machine's processes."""
    names = [released for released, kind in RELEASED.items() if MODELS[kind] == model.__name__]
    if name not in names:
        raise ValueError(
            f"{RELEASE_PREFIX}{name}: expected a {model.__name__} of the release, {RELEASE_PREFIX} and one of "
            f"{', '.join(names)}"
        )
    import huggingface_hub  # takes a second, and only the hub needs it

    ours = Path(huggingface_hub.constants.HF_HUB_CACHE).parent / "driftfield"
    folder = ours / (name if revision is None else f"{name}@{quote(revision, safe='')}")
    if not _is_there(folder):
        source = download_release(name, revision=revision)
        with open(source / METADATA_FILE, "rb") as file:
            with suppress(OSError):  # a disk without locks: several convert at once, to equal files
                fcntl.flock(file, fcntl.LOCK_EX)  # the others wait: a conversion takes twice the model's memory
            if not _is_there(folder):
                convert_release(source, folder, models=(model,))
    return folder


def _is_there(folder: Path) -> bool:
    return all((folder / file).is_file() for file in (CONFIG_FILE, WEIGHTS_FILE))


def _first_sentence(kind: type) -> str:
    """First line of a class's docstring, without the reference to the paper at its end."""
    line = (inspect.getdoc(kind) or "").partition("\n")[0]
    return re.sub(r" \([^()]*\)\.$", ".", line)
