-- Mark the threads and namespaces that the cold tier has as seen; from then on the bits are complete.
-- KEYS: seen, shard, a key for the time being
-- ARGV: generation, bits
-- Returns 1, or 0 if the generation has ended.
if redis.call('HGET', KEYS[2], 'g') ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[3], ARGV[2])
redis.call('BITOP', 'OR', KEYS[1], KEYS[1], KEYS[3])
redis.call('DEL', KEYS[3])
redis.call('HSET', KEYS[2], 'sr', ARGV[1])
return 1
