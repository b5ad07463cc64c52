-- Open a generation in a shard, unless a later one is open already.
-- KEYS: shard
-- ARGV: generation, least sequence number from now on
-- Returns the generation that is open now.
local known = redis.call('HMGET', KEYS[1], 'g', 'clock')
if known[1] and tonumber(known[1]) > tonumber(ARGV[1]) then return known[1] end
if tonumber(known[2] or '0') < tonumber(ARGV[2]) then redis.call('HSET', KEYS[1], 'clock', ARGV[2]) end
redis.call('HSET', KEYS[1], 'g', ARGV[1])
return ARGV[1]
