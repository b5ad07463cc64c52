-- Let a shard's clock start no earlier than PostgreSQL's last sequence number.
-- KEYS: shard
-- ARGV: sequence number
-- Returns the clock.
local last = tonumber(redis.call('HGET', KEYS[1], 'clock') or '0')
if last < tonumber(ARGV[1]) then redis.call('HSET', KEYS[1], 'clock', ARGV[1]) end
return redis.call('HGET', KEYS[1], 'clock')
