"""timm, with the models of this project registered. It takes 2.7 s to import: functions do, and --help need not wait."""

import timm

from backbone import face_transformer, insightface

__all__ = ["face_transformer", "insightface", "timm"]
