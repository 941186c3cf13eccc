"""The bundles that the settings name."""

from __future__ import annotations

from pathlib import Path

from jepakit._files import reason_of
from jepakit.bundles.bundle import Bundle, Inside, bundles_inside, is_bundle, open_bundle
from jepakit.errors import BundleError, DataError
from jepakit.run import is_run
from jepakit_service.settings import ServeSettings


def find_bundles(settings: ServeSettings) -> list[Bundle]:
    """The bundles that the settings name, with manifests checked, pinned digests enforced and names unique.

    Unreadable folders beside them are skipped. Raises BundleError, or DataError if there is no bundle.
    """
    by_name: dict[str, Bundle] = {}
    for path in (path for given in settings.bundles for path in _some_bundles(Path(given))):
        bundle = open_bundle(path)
        check_expected(bundle, settings)
        other = by_name.setdefault(bundle.name, bundle)
        if other is not bundle:
            if other.path.resolve() == bundle.path.resolve():
                raise BundleError(f"{bundle.path} is named twice: name it once, or only the folder around it")
            raise BundleError(
                f"{other.path} and {bundle.path} are both named {bundle.name!r}: export one with another --name"
            )
    return list(by_name.values())


def check_expected(bundle: Bundle, settings: ServeSettings) -> None:
    """Raise BundleError for a bundle whose digest is not one of those that were pinned."""
    if settings.expect and bundle.digest not in settings.expect:
        raise BundleError(
            f"{bundle.path} has digest {bundle.digest}, which is not the expected one ({' or '.join(settings.expect)}): it is another "
            "bundle than the one you pinned, or what you pinned is no digest of 64 hex digits (a model_id has 16)"
        )


def bundle_folders(given: Path) -> Inside:
    """The bundles at one path of the settings: the path itself, or those inside it. Raises OSError."""
    if is_bundle(given) or not given.is_dir():
        return Inside([given], {})
    return bundles_inside(given)


def _some_bundles(given: Path) -> list[Path]:
    """Like `bundle_folders`, but raises DataError if there is no bundle, for a run, or if the path cannot be read."""
    if is_run(given):
        raise DataError(f"{given} is a run, and what is served is exported: jepakit export {given} --out bundles/NAME")
    try:
        bundles, closed = bundle_folders(given)
    except OSError as error:
        raise DataError(
            f"{given} cannot be read ({reason_of(error)}): let this user read it, or mount it again"
        ) from None
    if not bundles:
        why = f" that can be read ({'; '.join(closed.values())})" if closed else ""
        raise DataError(f"{given} holds no bundle{why}: make one with `jepakit export … --out {given / 'NAME'}`")
    return bundles
