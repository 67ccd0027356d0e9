import numpy as np
def colorize(labels, palette): return np.asarray(palette)[labels]
def overlay(pixels, labels, palette): return (pixels*0.5+colorize(labels,palette)*0.5).astype(np.uint8)
def side_by_side(pixels, coarse, refined, points, palette): return np.concatenate([pixels, colorize(coarse,palette), colorize(refined,palette)],1)
