-- Tell a shard's generation and the one in which it was told which threads there are, if it takes writes.
-- KEYS: shard, probe
-- Returns {generation or false, generation or false}.
redis.call('SET', KEYS[2], '1', 'PX', 60000)
return redis.call('HMGET', KEYS[1], 'g', 'sr')
