"""The variance of one guided step, against weight draws and against branches taken as independent."""
