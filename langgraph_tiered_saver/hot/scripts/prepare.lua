-- Prepare a shard for a generation, which it enters when whoever prepared it has found that it may.
-- KEYS: shard
-- ARGV: generation, least sequence number from now on, who prepares it
-- Returns the generation that it is in, or false.
local known = redis.call('HMGET', KEYS[1], 'g', 'clock')
if known[1] and tonumber(known[1]) > tonumber(ARGV[1]) then return known[1] end
if tonumber(known[2] or '0') < tonumber(ARGV[2]) then redis.call('HSET', KEYS[1], 'clock', ARGV[2]) end
redis.call('HSET', KEYS[1], 'o:' .. ARGV[3], ARGV[1])
return known[1]
