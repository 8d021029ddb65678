"""Install Detectron2 0.6 without a compiler: ``python -m knet_d2.install_detectron2``.

    python -m knet_d2.install_detectron2                                  from the package registry
    python -m knet_d2.install_detectron2 --download FOLDER [--python 3.12 --platform manylinux_2_28_x86_64]
    python -m knet_d2.install_detectron2 --from FOLDER                    everything, without a network

See knet docs CLUSTERS, section "Machines without a network".
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .install_detectron2 import SDIST_NAME, SDIST_VERSION, InstallError, install_detectron2, install_panopticapi
from .offline import Target, download, install_from, read_installed


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m knet_d2.install_detectron2",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sources = parser.add_mutually_exclusive_group()
    sources.add_argument(
        "--sdist", type=Path, metavar="FILE", help=f"use this {SDIST_NAME}-{SDIST_VERSION}.tar.gz instead of a download"
    )
    sources.add_argument(
        "--download", type=Path, metavar="FOLDER", help="install nothing; download all that --from FOLDER needs"
    )
    sources.add_argument(
        "--from",
        type=Path,
        metavar="FOLDER",
        dest="folder",
        help="install Detectron2 and every dependency that is missing from a folder of --download, without a network",
    )
    parser.add_argument("--python", metavar="VERSION", help="--download: Python of the other machine, such as 3.12")
    parser.add_argument(
        "--platform",
        nargs="+",
        default=[],
        help="--download: platform of the other machine; manylinux_2_28_x86_64 is Linux with glibc 2.28 or newer",
    )
    parser.add_argument(
        "--missing-on",
        metavar="LIST",
        help="--download: leave out what the other machine has; a file written there by `python -m pip list "
        "--format=freeze`, or NAME==VERSION,NAME==VERSION",
    )
    parser.add_argument(
        "--also", nargs="+", default=[], metavar="REQUIREMENT", help="--download and --from: further packages"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = get_parser()
    args = parser.parse_args(argv)
    if not args.download and (args.python or args.platform or args.missing_on):
        parser.error("--python, --platform and --missing-on belong to --download FOLDER")
    if args.also and not (args.download or args.folder):
        parser.error("--also belongs to --download FOLDER or --from FOLDER")
    try:
        if args.download:
            installed = read_installed(args.missing_on) if args.missing_on else {}
            print(download(args.download, Target(args.python, args.platform, installed), args.also))
        elif args.folder:
            print("\n".join(install_from(args.folder, args.also)))
        else:
            print(install_detectron2(args.sdist), flush=True)
            print(install_panopticapi())
    except InstallError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted. Run the same command again to continue.", file=sys.stderr)
        return 130
    return 0
