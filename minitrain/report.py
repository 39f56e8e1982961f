def write(folder, config, results, baseline): pass
