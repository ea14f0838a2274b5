"""Patients, slides and patches: cohorts, readers, augmentation, seeded sampling, datasets and batches.

Nothing here loads torchvision before an augmentation needs it.
"""

from hsat.data.augment import Augmentation, AugmentationPolicy, build_transform
from hsat.data.augment_batch import augment_batch
from hsat.data.cohort import Cohort, PatchRecord
from hsat.data.datasets import HierarchicalDataset, PatchDataset, Sample
from hsat.data.file_check import FileCheck, FileProblem, read_exclusions
from hsat.data.folders import read_class_folders, read_folders
from hsat.data.found_layout import find_cohort
from hsat.data.layouts import ReadOptions, read_cohort
from hsat.data.loaders import SlideLoader, collate, hierarchical_loader, patch_loader, slide_loader
from hsat.data.opensrh import read_opensrh
from hsat.data.patch_store import PatchStore
from hsat.data.patch_store_writer import write_patch_store
from hsat.data.readers import BadPatch, read_patch
from hsat.data.sampler import PatientBatchSampler, PatientDraw
from hsat.data.split_names import find_splits, rename_splits
from hsat.data.srh import srh_to_rgb
from hsat.data.synthetic import write_synthetic_cohort
from hsat.data.tables import from_frame, read_csv
from hsat.types import HierarchicalBatch

__all__ = [
    "Augmentation",
    "AugmentationPolicy",
    "BadPatch",
    "Cohort",
    "FileCheck",
    "FileProblem",
    "HierarchicalBatch",
    "HierarchicalDataset",
    "PatchDataset",
    "PatchRecord",
    "PatchStore",
    "PatientBatchSampler",
    "PatientDraw",
    "ReadOptions",
    "Sample",
    "SlideLoader",
    "augment_batch",
    "build_transform",
    "collate",
    "find_cohort",
    "find_splits",
    "from_frame",
    "hierarchical_loader",
    "patch_loader",
    "read_class_folders",
    "read_cohort",
    "read_csv",
    "read_exclusions",
    "read_folders",
    "read_opensrh",
    "read_patch",
    "rename_splits",
    "slide_loader",
    "srh_to_rgb",
    "write_patch_store",
    "write_synthetic_cohort",
]
